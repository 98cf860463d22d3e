"""The search space of a sweep: the values of each key, and the configurations drawn from them.

    training.lr=1e-3,2e-3,4e-3       a list of alternatives
    training.betas=[0.9,0.95],[0.9,0.99]    commas in brackets and quotes do not separate
    training.lr=1e-4..1e-2           a range, from which a random search draws

A key with one value is the same in all runs.
"""

import itertools
import math
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from pocketlm.config.loading import COMMAND_LINE, load_config, typed_value
from pocketlm.config.sections import SECTIONS, Config
from pocketlm.config.strict_yaml import FLOAT
from pocketlm.errors import UserError

RANGE = re.compile(rf"(?P<low>{FLOAT})\.\.(?P<high>{FLOAT})")
LOG_RATIO = 10  # a range of positive numbers whose ends are this far apart is drawn on a log scale
MAX_RUNS = 10_000
DIGITS = 6  # significant digits of a number drawn from a range
OPENING, CLOSING = "[{", "]}"

Settings = dict[str, str]  # value of each key of the sweep, as typed on the command line


@dataclass(frozen=True)
class Axis:
    """A key of the sweep with its alternatives or its range."""

    key: str
    values: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None

    @property
    def distribution(self) -> BaseDistribution:
        """The distribution of the key's values, as optuna stores it."""
        if self.low is None or self.high is None:
            return CategoricalDistribution(self.values)
        log = self.low > 0 and self.high / self.low >= LOG_RATIO
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=log)
        return FloatDistribution(self.low, self.high, log=log)

    def contains(self, value: str) -> bool:
        """Return whether a value, as typed, is an alternative or in the range."""
        if self.low is None or self.high is None:
            return value in self.values
        return self.low <= number(value) <= self.high

    @property
    def text(self) -> str:
        """The axis as it is typed."""
        if self.low is not None:
            return f"{self.low:g}..{self.high:g}"
        return ",".join(self.values)


@dataclass(frozen=True)
class Configuration:
    """One configuration of a sweep: what `train.py` is given, without the seed and the name."""

    path: str  # of the config file
    settings: Settings
    fixed: tuple[str, ...] = ()  # overrides that all configurations share
    config: Config = field(default_factory=Config, compare=False, repr=False)

    @property
    def overrides(self) -> list[str]:
        return [*self.fixed, *(f"{key}={value}" for key, value in self.settings.items())]

    @property
    def label(self) -> str:
        """The settings in one line; without any, the name of the config."""
        return describe(self.settings) or Path(self.path).stem

    def loaded(self) -> "Configuration":
        """Return this configuration with its Config. Raises UserError, as train.py does."""
        config = load_config(self.path, self.overrides)
        return Configuration(self.path, self.settings, self.fixed, config)


def describe(settings: Settings) -> str:
    """Return settings in one line.

    >>> describe({"training.lr": "1e-3", "model.d_ff": "64"})
    'training.lr=1e-3 model.d_ff=64'
    """
    return " ".join(f"{key}={value}" for key, value in settings.items())


# ---- from the command line ----


def split_alternatives(text: str) -> list[str]:
    """Return the parts of a text between commas that are not in brackets or quotes.

    >>> split_alternatives("[0.9,0.95],[0.9,0.99]"), split_alternatives("'a,b',c")
    (['[0.9,0.95]', '[0.9,0.99]'], ["'a,b'", 'c'])
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        at_start = not parts[-1]
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (at_start or depth):
            quote = character
        elif character in OPENING and (at_start or depth):
            depth += 1
        elif character in CLOSING and depth:
            depth -= 1
        elif character == "," and not depth:
            parts.append("")
            continue
        parts[-1] += character
    return parts


def parse_overrides(overrides: Iterable[str]) -> tuple[list[str], list[Axis]]:
    """Return the overrides with one value, and an axis for each of the others.

    Raises UserError for an empty or repeated alternative, and for a key given twice.
    """
    fixed: list[str] = []
    axes: list[Axis] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        axis = parse_axis(key, text) if equals else None
        if axis is None:
            fixed.append(override)
        elif any(axis.key == other.key for other in axes):
            raise UserError(f"{key} has alternatives twice; write them in one list")
        else:
            axes.append(axis)
    return fixed, axes


def parse_axis(key: str, text: str) -> Axis | None:
    """Return the axis of `key=text`; None if it has a single value."""
    if match := RANGE.fullmatch(text):
        low, high = (number(match[end]) for end in ("low", "high"))
        if not -math.inf < low < high < math.inf:
            raise UserError(f"{key}={text} is no range; write LOW..HIGH with LOW below HIGH")
        return Axis(key, low=low, high=high)
    values = split_alternatives(text)
    if len(values) == 1:
        return None
    if not all(value.strip() for value in values):
        raise UserError(
            f"{key}={text} has an empty alternative; remove a comma, or write quotes around a text "
            "with commas"
        )
    section, _, name = key.partition(".")
    if section in SECTIONS and name in typing.get_type_hints(SECTIONS[section]):
        position = f"{COMMAND_LINE}: {key}"
        typed = [typed_value(section, name, value, position) for value in values]
        for i, value in enumerate(typed):
            if value in typed[:i]:
                raise UserError(f"{key}={text} has the value {values[i]} twice; remove one")
    return Axis(key, tuple(values))


def number(text: str) -> float:
    """Return an int or a float.

    >>> number("3"), number("1e-3")
    (3, 0.001)
    """
    is_int = re.fullmatch("[-+]?[0-9]{1,18}", text)  # optuna keeps 64 bits
    return int(text) if is_int else float(text)


# ---- configurations ----


def grid(axes: Sequence[Axis]) -> list[Settings]:
    """Return all combinations of the alternatives. Raises UserError for a range."""
    for axis in axes:
        if axis.low is not None:
            raise UserError(
                f"{axis.key}={axis.text} is a range, which has no list of values; list them, or "
                "add --search random --trials N"
            )
    require_few(math.prod(len(axis.values) for axis in axes), "combinations")
    keys = [axis.key for axis in axes]
    combinations = itertools.product(*(axis.values for axis in axes))
    return [dict(zip(keys, values, strict=True)) for values in combinations]


def require_few(count: int, what: str) -> None:
    """Raise UserError for more than a sweep can have."""
    if count > MAX_RUNS:
        raise UserError(f"{count:,} {what} are too many for a sweep; the limit is {MAX_RUNS:,}")


def draw(axes: Sequence[Axis], count: int) -> list[Settings]:
    """Return different random settings; the same for the same axes. A longer list begins with them.

    Raises UserError if there are not so many.
    """
    require_few(count, "trials")
    if all(axis.low is None for axis in axes):
        possible = len(grid(axes))
        if count > possible:
            raise UserError(
                f"--trials {count}: there are only {possible} combinations of the listed values"
            )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler)  # in memory
    distributions = {axis.key: axis.distribution for axis in axes}
    drawn: list[Settings] = []
    for _ in range(1000 * count):
        params = study.ask(distributions).params
        settings = {key: as_text(value) for key, value in params.items()}
        inside = all(axis.contains(settings[axis.key]) for axis in axes)  # also when rounded
        if inside and settings not in drawn:
            drawn.append(settings)
        if len(drawn) == count:
            return drawn
    raise UserError(f"--trials {count}: there are only {len(drawn)} different settings to draw")


def as_text(value: object) -> str:
    """Return a drawn value as it is typed."""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def configurations(
    path: str | Path, fixed: Sequence[str], settings: Iterable[Settings]
) -> list[Configuration]:
    """Return the loaded configurations. Raises UserError for one that train.py would refuse."""
    return [Configuration(str(path), each, tuple(fixed)).loaded() for each in settings]
