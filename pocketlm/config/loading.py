"""Settings from a YAML file and from `section.key=value`, and back to YAML.

A file contains only what differs from the defaults. An unknown key, a wrong type, a duplicate key
or sizes that do not fit together end in one sentence: the file, the line, the value, the remedy.

On the command line, the value of a text key is the text itself, whatever characters it has; other
values are a number, true, false, null, or a YAML list in brackets.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from pocketlm.config.other_names import HINTS
from pocketlm.config.sections import (
    SECTIONS,
    Config,
    DataConfig,
    MixtureConfig,
    SourceConfig,
)
from pocketlm.config.strict_yaml import (
    Dumper,
    KeyPath,
    Positions,
    build_dataclass,
    check_key,
    nearest_position,
    parse_scalar,
    parse_yaml,
)
from pocketlm.errors import UserError
from pocketlm.model.rope import RopeScaling

COMMAND_LINE = "on the command line"


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return the defaults, changed by the file, changed by the overrides. Raises UserError.

    An override is `section.key=value`; `typed_value` says how the value is read.
    """
    values, positions = parse_yaml(read_text(Path(path)), str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        sections = ", ".join(SECTIONS)
        raise UserError(f"{path}: a config is a mapping of sections ({sections}), not {values!r}")
    for override in overrides:
        apply_override(override, values, positions)
    config = config_from_dict(values, positions, str(path))
    if config.data.mixture:
        check_mixture(config.data, positions, str(path))
    return config


def read_text(path: Path) -> str:
    """Return the text of a config file. Raises UserError that lists the configs there are."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        files = sorted([*Path().glob("[!.]*.yaml"), *Path("presets").glob("*.yaml")], key=str)
        by_stem = {file.stem: file for file in reversed(files)}
        similar = difflib.get_close_matches(path.stem, by_stem, n=1)
        hint = f"did you mean {by_stem[similar[0]]}? " if similar else ""
        listed = ", ".join(map(str, files)) or "none"
        raise UserError(f"there is no config {path}; {hint}here are {listed}") from None
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # ~ of an unknown user
        raise UserError(f"cannot read the config {path}: {error}") from None


def apply_override(override: str, values: dict[str, Any], positions: Positions) -> None:
    """Set the key of `section.key=value` in `values`, with the command line as its position."""
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and name):
        raise UserError(
            f"{override!r} is not an override; "
            "write section.key=value, for example training.max_steps=20"
        )
    position = f"{COMMAND_LINE}: {key}"
    check_key(section, SECTIONS, position, "there is no section")
    value = typed_value(section, name, text, position)
    if values.get(section) is None:
        values[section] = {}
    if not isinstance(values[section], dict):
        return  # config_from_dict reports the mistake in the file
    values[section][name] = value
    for path in [path for path in positions if path[:2] == (section, name)]:
        del positions[path]  # positions of the value that has been replaced
    positions[section, name] = COMMAND_LINE


def typed_value(section: str, name: str, text: str, position: str) -> Any:
    r"""Return the value that `text` means for a key, when it is typed on the command line.

    A text key has the text as it is typed, `#`, `:` and `~` included; null means none where the key
    may be null, and a value in quotes is a YAML string. Other keys have one plain scalar, or YAML
    if the text begins with a sign of it. In a separator, \n, \r, \t and \\ are a line feed, a
    carriage return, a tab and a backslash.
    """
    hint = typing.get_type_hints(SECTIONS[section]).get(name)
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    is_text = str in parts or all(typing.get_origin(part) is Literal for part in parts)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    value: Any
    if is_text and not quoted and not (text == "null" and types.NoneType in parts):
        value = check_text(text, position)
    elif text[:1] in tuple("[{*&!'\""):
        value, _ = parse_yaml(text, position)
    else:
        value = parse_scalar(text.strip(), position)
    if (section, name) == ("data", "separator") and not quoted:
        return unescape(value)
    if (section, name) == ("data", "mixture") and isinstance(value, list):
        for source in value:
            if isinstance(source, dict) and "separator" in source:
                source["separator"] = unescape(source["separator"])
    return value


def check_text(text: str, position: str) -> str:
    """Return the text. Raises UserError for bytes that were typed and are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{position}: {text!r} is not UTF-8") from None
    return text


def unescape(value: Any) -> Any:
    r"""Return a text with \n, \r, \t and \\ as the characters that they mean.

    >>> unescape(r"\n\n"), unescape(r"\\n"), unescape(r"\section")
    ('\n\n', '\\n', '\\section')
    """
    if not isinstance(value, str):
        return value
    characters = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda match: characters[match[1]], value)


def config_from_dict(
    values: dict[str, Any], positions: Positions | None = None, origin: str = "config"
) -> Config:
    """Return the Config of nested plain dicts. Raises UserError for an unknown key or wrong value.

    Messages give a key's position, or `origin` for a key that has none.
    """
    positions = positions or {}
    sections = {}
    for section, settings in values.items():
        position = nearest_position((str(section),), positions, origin)
        check_key(section, SECTIONS, position, "there is no section")
        if settings is not None:
            sections[section] = build_section(section, settings, positions, origin)
    try:
        return Config(**sections)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None


def build_section(section: str, values: Any, positions: Positions, origin: str) -> Any:
    """Return the dataclass of a section; a mixture's sources and a scaling are dataclasses too."""
    built: dict[str, Any] = {}
    if section == "model" and isinstance(values, dict) and values.get("rope_scaling") is not None:
        path = ("model", "rope_scaling")
        scaling = values["rope_scaling"]
        values = {key: value for key, value in values.items() if key != "rope_scaling"}
        built["rope_scaling"] = build_dataclass(RopeScaling, scaling, path, positions, origin)
    if section == "data" and isinstance(values, dict) and "mixture" in values:
        sources = values["mixture"]
        values = {key: value for key, value in values.items() if key != "mixture"}
        if sources is not None:
            built["mixture"] = build_mixture(sources, positions, origin)
    return build_dataclass(
        SECTIONS[section], values, (section,), positions, origin, other_names=HINTS, built=built
    )


def check_mixture(data: DataConfig, positions: Positions, origin: str) -> None:
    """Raise UserError for a key of a single source, which a mixture does not read.

    A corpus, the default or a preset's, is replaced by a mixture as it is by a path.
    """
    for key in dataclasses.fields(SourceConfig):
        value = getattr(data, key.name)
        if key.name != "source" and value != key.default:
            default = "null" if key.default is None else key.default
            raise UserError(
                f"{nearest_position(('data', key.name), positions, origin)}: data.{key.name} is "
                f"{value!r}, which no source of data.mixture reads; write it into the sources that "
                f"it is meant for, and set data.{key.name} to {default}"
            )


def build_mixture(sources: Any, positions: Positions, origin: str) -> tuple[MixtureConfig, ...]:
    """Return the sources of data.mixture."""
    path: KeyPath = ("data", "mixture")
    if not isinstance(sources, list):
        raise UserError(
            f"{nearest_position(path, positions, origin)}: "
            f"data.mixture is a list of sources, each with its weight, not {sources!r}"
        )
    return tuple(
        build_dataclass(MixtureConfig, source, (*path, str(index)), positions, origin)
        for index, source in enumerate(sources)
    )


def to_yaml(config: Config) -> str:
    """Return the complete config as YAML that loads back to the same config."""
    return yaml.dump(config.to_dict(), Dumper=Dumper, sort_keys=False, default_flow_style=None)
