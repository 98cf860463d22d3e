"""Settings from a YAML file and from `section.key=value`, and back to YAML.

A file contains only what differs from the defaults. An unknown key, a wrong type, a duplicate key
or sizes that do not fit together end in one sentence: the file, the line, the value, the remedy.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pocketlm.config.other_names import HINTS
from pocketlm.config.sections import SECTIONS, Config, MixtureConfig
from pocketlm.config.strict_yaml import (
    Dumper,
    KeyPath,
    Positions,
    build_dataclass,
    check_key,
    nearest_position,
    parse_yaml,
)
from pocketlm.errors import UserError

COMMAND_LINE = "on the command line"


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return the defaults, changed by the file, changed by the overrides. Raises UserError.

    An override is `section.key=value`, with the value in YAML.
    """
    values, positions = parse_yaml(read_text(Path(path)), str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        sections = ", ".join(SECTIONS)
        raise UserError(f"{path}: a config is a mapping of sections ({sections}), not {values!r}")
    for override in overrides:
        apply_override(override, values, positions)
    return config_from_dict(values, positions, str(path))


def read_text(path: Path) -> str:
    """Return the text of a config file. Raises UserError that lists the configs there are."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        files = sorted([*Path().glob("[!.]*.yaml"), *Path("presets").glob("*.yaml")], key=str)
        by_stem = {file.stem: file for file in reversed(files)}
        similar = difflib.get_close_matches(path.stem, by_stem, n=1)
        hint = f"did you mean {by_stem[similar[0]]}? " if similar else ""
        listed = ", ".join(map(str, files)) or "none"
        raise UserError(f"there is no config {path}; {hint}here are {listed}") from None
    except (OSError, UnicodeDecodeError) as error:
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
    value, _ = parse_yaml(text, position)
    if values.get(section) is None:
        values[section] = {}
    if not isinstance(values[section], dict):
        return  # config_from_dict reports the mistake in the file
    values[section][name] = value
    for path in [path for path in positions if path[:2] == (section, name)]:
        del positions[path]  # positions of the value that has been replaced
    positions[section, name] = COMMAND_LINE


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
    """Return the dataclass of a section. The sources of a mixture are dataclasses themselves."""
    built = {}
    if section == "data" and isinstance(values, dict) and "mixture" in values:
        sources = values["mixture"]
        values = {key: value for key, value in values.items() if key != "mixture"}
        if sources is not None:
            built["mixture"] = build_mixture(sources, positions, origin)
    return build_dataclass(
        SECTIONS[section], values, (section,), positions, origin, other_names=HINTS, built=built
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
