"""Settings from YAML and from `section.key=value`, strictly, and back to YAML.

A file names only what differs from the defaults. An unknown key, a wrong type, a duplicate key or sizes that do not fit end in
one sentence that names the file, the line, the value and the remedy.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pocketlm.config.sections import SECTIONS, Config
from pocketlm.config.strict_yaml import Dumper, build, check_key, parse_yaml
from pocketlm.errors import UserError


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The defaults, changed by the file, changed by `section.key=value` overrides. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        there = sorted(str(p) for p in [*Path().glob("*.yaml"), *Path("presets").glob("*.yaml")])
        near = difflib.get_close_matches(Path(path).stem, [Path(p).stem for p in there], n=1)
        hint = f"did you mean {next(p for p in there if Path(p).stem == near[0])}? " if near else ""
        raise UserError(
            f"there is no config {path}; {hint}here are {', '.join(there) or 'none'}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from None
    values, places = parse_yaml(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: a config is a mapping of sections ({', '.join(SECTIONS)}), not {values!r}"
        )
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise UserError(
                f"{override!r} is not an override; write section.key=value, for example training.max_steps=20"
            )
        check_key(section, list(SECTIONS), f"on the command line: {key}")
        value = parse_yaml(value, f"on the command line: {key}")[0]
        if values.get(section) is None:
            values[section] = {}
        if isinstance(values[section], dict):  # else the file's mistake is told below
            values[section][name] = value
            places[section, name] = "on the command line"
    return config_from_dict(values, places, str(path))


def config_from_dict(
    values: dict[str, Any], places: dict[tuple[str, ...], str] | None = None, origin: str = "config"
) -> Config:
    """Check keys and types of nested plain dicts, and build the Config. `places` say in a message where a key stands."""
    places = places or {}
    sections = {}
    for section, given in values.items():
        check_key(section, list(SECTIONS), places.get((section,), origin))
        if given is not None:
            sections[section] = build(SECTIONS[section], given, (section,), places, origin)
    try:
        return Config(**sections)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that loads back to the same."""
    return yaml.dump(config.to_dict(), Dumper=Dumper, sort_keys=False, default_flow_style=None)
