"""The order of a sweep's runs, within a budget of time: every configuration, or successive halving.

All configurations are trained with the first seed, then with the second, so that a budget that ends
early has measured each of them. Successive halving (Jamieson & Talwalkar 2016, AISTATS) trains all
of them for a part of the steps, and the better half goes on from there, until two have all steps.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]  # has no types

from pocketlm.data.loaders import resolve_max_steps
from pocketlm.data.prepare import prepare
from pocketlm.errors import UserError
from pocketlm.hardware.devices import choose_hardware
from pocketlm.hardware.memory import choose_micro_batch
from pocketlm.hardware.processes import print_note
from pocketlm.sweeps.runs import read_losses, train
from pocketlm.sweeps.space import Configuration
from pocketlm.sweeps.study import Key, Record, Study
from pocketlm.training.metrics import as_clock
from pocketlm.training.plan import estimated_seconds

UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)([dhms]))")
SAME_LENGTH = 0.1  # relative difference below which runs count as equally long
SAVE_TIME_EVERY = 5.0  # seconds between records of the time of a run in progress


class BudgetSpent(Exception):
    """The next run does not fit the budget, or the budget ended during a run."""


def parse_duration(text: str) -> float:
    """Return the seconds of a duration. Raises UserError.

    >>> parse_duration("2h"), parse_duration("1h30m"), parse_duration("90s")
    (7200.0, 5400.0, 90.0)
    """
    parts = DURATION.findall(text)
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < math.inf:
        raise UserError(
            f"--budget {text!r} is no duration; write for example 90s, 20m, 2h or 1h30m"
        )
    return seconds


def resolve(configuration: Configuration) -> tuple[Configuration, float]:
    """Return the configuration with its number of steps, and an estimate of its run's seconds.

    Prepares its data, as train.py would. Raises UserError.
    """
    config = configuration.config
    hardware = choose_hardware(config.hardware, config.training.precision)
    data = prepare(config.data)
    config = config.with_vocab_size(data.tokenizer.vocab_size)
    if config.training.micro_batch_size == "auto":
        config = choose_micro_batch(config, hardware.accelerator, hardware.precision, None)
    config = resolve_max_steps(config, data, hardware.precision)
    return replace(configuration, config=config), estimated_seconds(config, data, hardware)


# ---- time ----


@dataclass
class Clock:
    """The budget of a sweep in seconds, and estimates of its runs.

    planned: seconds that the plan of each configuration's run estimates, by its number.
    """

    study: Study
    planned: Mapping[int, float]
    budget: float = math.inf

    @property
    def left(self) -> float:
        return self.budget - self.study.seconds

    def estimate(self, key: Key, share: float = 1.0) -> float:
        """Return the seconds that a part of a run is expected to take.

        The runs that are done give the time of a start and the time per planned second.
        """
        planned = self.planned[key[0]] * share
        done = [
            (self.planned[other[0]] * record.losses.step / self.study.steps(other), record.seconds)
            for other, record in self.study.records.items()
            if record.losses and not record.problem
        ]
        return expected_seconds(planned, done)

    def require(self, seconds: float) -> None:
        """Raise BudgetSpent if a run of so many seconds does not fit."""
        if seconds <= self.left:
            return
        budget, left = as_clock(self.budget), as_clock(max(0.0, self.left))
        if not self.study.seconds:
            raise UserError(
                f"--budget: {budget} is less than one run is expected to take "
                f"({as_clock(seconds)}); allow more, or train fewer steps"
            )
        raise BudgetSpent(
            f"the next run is expected to take {as_clock(seconds)}, and {left} of the budget of "
            f"{budget} are left"
        )


def expected_seconds(planned: float, done: Sequence[tuple[float, float]]) -> float:
    """Return the seconds of a run, from the planned and the real seconds of runs that are done.

    A run takes a constant time, to start and to end, and a multiple of what was planned; both are
    fitted, not below zero. Runs of one length do not tell them apart: then a longer run is expected
    to take longer by what is planned.

    >>> expected_seconds(30, [(10, 25), (20, 45)]), expected_seconds(30, [(10, 25)])
    (65.0, 45.0)
    """
    if not done:
        return planned
    x, y = np.array(done, dtype=np.float64).T
    if np.ptp(x) < SAME_LENGTH * x.max():
        return max(planned, float(y.mean() + planned - x.mean()))
    (constant, factor), _ = nnls(np.stack([np.ones_like(x), x], axis=1), y)
    return round(float(constant + factor * planned), 6)


class Search:
    """The runs of a sweep, one process at a time."""

    def __init__(self, study: Study, seeds: Sequence[int], clock: Clock, metric: str):
        self.study, self.seeds, self.clock, self.metric = study, seeds, clock, metric
        self.done = {key for key, record in study.records.items() if record.final}

    @property
    def numbers(self) -> list[int]:
        """The numbers of all configurations."""
        return list(range(1, len(self.study.configurations) + 1))

    def grid(self, numbers: Sequence[int] | None = None) -> None:
        """Train all configurations, or those of these numbers, with every seed.

        Raises BudgetSpent.
        """
        keys = [(n, s) for s in self.seeds for n in numbers or self.numbers]
        missing = [key for key in keys if key not in self.done]
        if len(missing) < len(keys):
            print_note(f"{len(keys) - len(missing)} of {len(keys)} runs are done")
        for key in missing:
            self.train(key, f"{keys.index(key) + 1}/{len(keys)}")

    def halving(self) -> None:
        """Train all configurations to the first rung, and the better half to each of the next.

        Raises BudgetSpent.
        """
        numbers = self.numbers
        steps = self.study.steps((1, self.seeds[0]))
        every = self.study.configurations[0].config.training.val_every_steps
        for step, count in rungs(len(numbers), steps, every):
            for seed in self.seeds:
                for number in numbers[:]:
                    self.train_to((number, seed), step)
            losses = {number: self.losses_at(number, step) for number in numbers}
            if step < steps:
                numbers = promoted(losses, count)
                print_note(f"step {step}: {len(numbers)} of {len(losses)} configurations go on")

    def train_to(self, key: Key, step: int) -> None:
        """Train a run to a rung unless it has been there, or has failed."""
        record = self.study.records.get(key)
        reached = record and (record.finished or record.losses and record.losses.step >= step)
        if key in self.done and record and (reached or record.problem):
            return
        self.train(key, f"to step {step}", step)

    def losses_at(self, number: int, step: int) -> list[float]:
        """Return the losses of a configuration's seeds at a rung; infinite where a run failed."""
        losses = []
        for seed in self.seeds:
            record = self.study.records[number, seed]
            at_rung = None if record.problem else read_losses(self.study.run((number, seed)), step)
            losses.append(getattr(at_rung or record.losses, self.metric, math.inf))
            if record.problem:
                losses[-1] = math.inf
        return losses

    def train(self, key: Key, progress: str, step: int | None = None) -> None:
        """Train a run to its end, or to a step, and record it. Raises BudgetSpent."""
        study, run = self.study, self.study.run(key)
        whole = study.steps(key)
        target = min(step or whole, whole)
        previous = study.records.get(key)
        start = previous.losses.step if previous and previous.losses else 0
        self.clock.require(self.clock.estimate(key, (target - start) / whole))
        label = f"[{progress}] {study.configuration(key[0]).label} seed {key[1]}"
        print_note(f"{label}: about {as_clock(self.clock.estimate(key, (target - start) / whole))}")
        before = study.seconds_before(key) + (previous.seconds if previous else 0.0)
        watch = Watch(study, key, self.clock, target if target < whole else None)
        try:
            ending = train(self.arguments(key), run, study.log(key), watch.should_stop)
        except SystemExit:
            watch.save()
            raise
        if ending.stopped and not watch.at_rung:
            watch.save()
            raise BudgetSpent("the budget ended during a run, which has saved its last step")
        if watch.at_rung and not ending.problem:
            ending = replace(ending, losses=read_losses(run, target))
        if not ending.problem and ending.losses and ending.losses.step > whole:
            found = f"{run.checkpoints} is a run of {ending.losses.step:,} steps, not {whole:,}"
            ending = replace(ending, problem=f"{found}; remove it or give another run.name")
        record = study.add(key, ending, before + watch.seconds)
        self.done.add(key)
        print_note(f"{label}: {outcome(record)}")

    def arguments(self, key: Key) -> list[str]:
        """Return the arguments of train.py for a run, which keeps a single checkpoint."""
        configuration = self.study.configuration(key[0])
        return [
            "--config",
            configuration.path,
            "training.keep_checkpoints=1",
            *configuration.overrides,
            f"training.seed={key[1]}",
            f"run.name={self.study.run(key).name}",
        ]


class Watch:
    """The stop-watch of a run in progress, which decides when it has to stop."""

    def __init__(self, study: Study, key: Key, clock: Clock, rung: int | None):
        self.study, self.key, self.rung = study, key, rung
        self.left, self.before = clock.left, study.seconds_before(key)
        self.start = self.saved = time.monotonic()
        self.at_rung = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def save(self) -> None:
        """Record the time so far."""
        self.study.keep_seconds(self.key, self.before + self.seconds)
        self.saved = time.monotonic()

    def should_stop(self) -> bool:
        """Return whether the run has reached its rung, or the budget is spent."""
        if time.monotonic() - self.saved > SAVE_TIME_EVERY:
            self.save()
        if self.rung is not None:
            losses = read_losses(self.study.run(self.key))
            self.at_rung = losses is not None and losses.step >= self.rung
        return self.at_rung or self.seconds > self.left


def outcome(record: Record) -> str:
    """Return how a run ended, in a few words."""
    if record.problem:
        return f"failed: {record.problem}"
    assert record.losses
    losses = record.losses
    text = f"best {losses.best_loss:.4f}, last {losses.final_loss:.4f} at step {losses.step:,}"
    return f"{text}, {as_clock(record.seconds)}"


# ---- successive halving ----


def rungs(count: int, steps: int, every: int) -> list[tuple[int, int]]:
    """Return the steps at which configurations are compared, and how many go on from each.

    Each rung has half the steps of the next one, rounded up to a validation; the last one has all
    steps. Raises UserError if no validation is early enough.

    >>> rungs(8, 1000, 50)
    [(250, 4), (500, 2), (1000, 2)]
    """
    halvings = []
    while count > 2:
        count = math.ceil(count / 2)
        halvings.append(count)
    found = []
    for i, kept in enumerate(halvings):
        exact = steps / 2 ** (len(halvings) - i)
        found.append((math.ceil(exact / every) * every, kept))
    distinct = {step for step, _ in found}
    if len(distinct) < len(found) or any(step >= steps for step in distinct):
        first = steps // 2 ** len(halvings)
        raise UserError(
            f"training.val_every_steps is {every}, too many to compare runs at step {first} of "
            f"{steps} and at each doubling of it; set it to {max(1, first)} or less"
        )
    return [*found, (steps, count)]


def promoted(losses: Mapping[int, Sequence[float]], count: int) -> list[int]:
    """Return the `count` configurations with the lowest mean loss, in their order.

    >>> promoted({1: [2.0, 2.2], 2: [1.0, 1.2], 3: [1.5, 1.5]}, 2)
    [2, 3]
    """
    means = {number: math.fsum(values) / len(values) for number, values in losses.items()}
    finite = [number for number in means if math.isfinite(means[number])]
    return sorted(sorted(finite, key=lambda number: means[number])[:count])
