"""YAML 1.2 read strictly, with the position of every key, and dataclasses built from plain values.

    values, positions = parse_yaml(text, "c.yaml")
    section = build_dataclass(Kind, values["section"], ("section",), positions, "c.yaml")

A *key path* is the tuple of keys and list indices that lead to a value; a *position* is
`file:line`. Every mistake is a UserError that names the position, the value and the remedy.
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from pocketlm.errors import FieldError, UserError
from pocketlm.limits import MAX_YAML_CHARACTERS, MAX_YAML_DEPTH

T = TypeVar("T")

KeyPath = tuple[str, ...]
Positions = dict[KeyPath, str]

TOO_DEEP = f"this value is nested more than {MAX_YAML_DEPTH} levels deep"

TAG = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 3e-4 is a number, 010 is ten, `no` and 12:30 are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    # The time of PyYAML's scanner grows with the square of the depth: it stops at the limit.

    def fetch_flow_collection_start(self, token_class: type[yaml.Token]) -> None:
        super().fetch_flow_collection_start(token_class)
        self.check_depth()

    def add_indent(self, column: int) -> bool:
        added: bool = super().add_indent(column)
        self.check_depth()
        return added

    def check_depth(self) -> None:
        """Raise YAMLError if collections are open that no value may be nested in."""
        if self.flow_level + len(self.indents) > MAX_YAML_DEPTH + 2:
            raise yaml.scanner.ScannerError(None, None, TOO_DEEP, self.get_mark())


class Dumper(yaml.SafeDumper):
    """YAML writer that quotes the texts that Loader would read as another type."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


class Scalar(NamedTuple):
    """One type of scalar."""

    pattern: str
    first_characters: list[str]  # of plain text that is tried as this type; empty: none is
    convert: Callable[[str], Any]


def parse_bool(text: str) -> bool:
    """Return whether the text is a spelling of true."""
    return text[0] in "tT"


def parse_null(text: str) -> None:
    """Return None."""


def parse_float(text: str) -> float:
    """Return the number; YAML writes infinity as .inf and not-a-number as .nan."""
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"

SCALARS = {
    "bool": Scalar(r"true|True|TRUE|false|False|FALSE", list("tTfF"), parse_bool),
    "null": Scalar(r"~|null|Null|NULL|", ["~", "n", "N", ""], parse_null),
    "int": Scalar(r"[-+]?[0-9]+", list("-+0123456789"), int),
    "float": Scalar(
        FLOAT + r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789"), parse_float
    ),
    "str": Scalar(r"(?s:.*)", [], str),
}

for _tag, _scalar in SCALARS.items():
    if _scalar.first_characters:
        Loader.add_implicit_resolver(
            TAG + _tag, re.compile(f"^(?:{_scalar.pattern})$"), _scalar.first_characters
        )


class StrictYaml:
    """Parser of one YAML text; `positions` has the position of every key and list item.

    It builds mappings, lists and scalars and nothing else. Aliases, other tags, duplicate keys and
    nesting beyond MAX_YAML_DEPTH are errors.
    """

    def __init__(self, origin: str):
        self.origin = origin
        self.positions: Positions = {}

    def parse(self, text: str) -> Any:
        """Return the text's value in plain types. Raises UserError with the position."""
        try:
            for event in yaml.parse(text, Loader):
                if isinstance(event, yaml.AliasEvent):
                    raise self.error(
                        event, "aliases (*name) are not supported; write the value out"
                    )
            node = yaml.compose(text, Loader)
            return None if node is None else self.read_node(node, ())
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
            raise UserError(f"{self.origin}{line}: not valid YAML: {reason}") from error
        except RecursionError:
            raise UserError(f"{self.origin}: not valid YAML: nested too deeply") from None

    def read_node(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return the value of a node in plain types."""
        self.positions[path] = self.position(node)
        if len(path) > MAX_YAML_DEPTH:
            raise self.error(node, TOO_DEEP)
        kind = node.tag.removeprefix(TAG)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.read_node(item, (*path, str(i))) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.read_mapping(node, path)
        return self.read_scalar(node, kind)

    def read_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        """Return the mapping; its keys become text."""
        values = {}
        for key, value in node.value:
            key_path = (*path, str(key.value))
            if key_path in self.positions:
                first = self.positions[key_path]
                name = ".".join(key_path)
                raise self.error(key, f"{name} is already set at {first}; remove one of them")
            values[str(key.value)] = self.read_node(value, key_path)
            self.positions[key_path] = self.position(key)
        return values

    def read_scalar(self, node: yaml.Node, kind: str) -> Any:
        """Return the scalar, converted to the type that its tag names."""
        scalar = SCALARS.get(kind)
        matches = (
            isinstance(node, yaml.ScalarNode)
            and scalar is not None
            and re.fullmatch(scalar.pattern, node.value)
        )
        if scalar is None or not matches:
            tag = node.tag.replace(TAG, "!!")
            raise self.error(node, f"the tag {tag} does not fit this value")
        try:
            node.value.encode()
            return scalar.convert(node.value)
        except ValueError as error:  # half a surrogate pair, or thousands of digits
            raise self.error(node, f"not a value: {error}") from None

    def position(self, node: yaml.Node | yaml.Event) -> str:
        """Return the `file:line` where the node begins."""
        assert node.start_mark is not None
        return f"{self.origin}:{node.start_mark.line + 1}"

    def error(self, node: yaml.Node | yaml.Event, reason: str) -> UserError:
        """Return the UserError for a node."""
        return UserError(f"{self.position(node)}: {reason}")


def parse_yaml(
    text: str, origin: str, max_characters: int = MAX_YAML_CHARACTERS
) -> tuple[Any, Positions]:
    """Return the text's value in plain types and the positions of its keys and list items.

    `origin` names the text in positions and messages, usually its file. Raises UserError.
    """
    if len(text) > max_characters:
        raise UserError(
            f"{origin}: {len(text):,} characters are too many for a file of this kind; at most "
            f"{max_characters:,} are read"
        )
    parser = StrictYaml(origin)
    return parser.parse(text), parser.positions


def parse_scalar(text: str, origin: str) -> Any:
    """Return what a plain scalar of YAML means, without YAML's comments and other syntax.

    >>> parse_scalar("3e-4", ""), parse_scalar("null", ""), parse_scalar("5 # five", "")
    (0.0003, None, '5 # five')
    """
    for scalar in SCALARS.values():
        if re.fullmatch(scalar.pattern, text):
            try:
                return scalar.convert(text)
            except ValueError as error:  # thousands of digits
                raise UserError(f"{origin}: not a value: {error}") from None
    raise AssertionError("SCALARS has a pattern for every text")


@cache
def checking_model(kind: type, keys: tuple[str, ...]) -> type[BaseModel]:
    """Return the pydantic model that checks these fields of a dataclass."""
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {key: (hints[key], ...) for key in keys}
    return create_model(kind.__name__, __config__=ConfigDict(strict=True), **fields)


def build_dataclass(
    kind: Callable[..., T],
    values: Any,
    path: KeyPath,
    positions: Positions,
    origin: str,
    *,
    other_names: Mapping[str, str] | None = None,
    built: Mapping[str, Any] | None = None,
) -> T:
    """Return the dataclass `kind` with the plain `values` that were read at `path`.

    `other_names` are hints for keys of other programs. `built` are fields that already have their
    final value and are not checked again. Raises UserError for the first mistake.
    """
    assert isinstance(kind, type)
    name = ".".join(path)
    if not isinstance(values, dict):
        position = nearest_position(path, positions, origin)
        raise UserError(f"{position}: {name} is a section with keys of its own, not {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        position = nearest_position((*path, str(key)), positions, origin)
        check_key(key, hints.keys(), position, f"{name} has no key", other_names or {})
    try:
        # in JSON, a list becomes a tuple, and a whole number a float, where the field asks for one
        checked = checking_model(kind, tuple(values)).model_validate_json(json.dumps(values))
    except ValidationError as error:
        field, expected = first_mistake(error, hints)
        position = nearest_position((*path, field), positions, origin)
        raise UserError(
            f"{position}: {name}.{field} is {values[field]!r}; it should be {expected}"
        ) from None
    fields = {key: getattr(checked, key) for key in values}
    try:
        return typing.cast(T, kind(**fields, **(built or {})))
    except FieldError as error:
        position = nearest_position((*path, error.field), positions, origin)
        raise UserError(f"{position}: {name}.{error}") from None


def first_mistake(error: ValidationError, hints: Mapping[str, Any]) -> tuple[str, str]:
    """Return the field of pydantic's first complaint and a description of the expected value."""
    first = error.errors()[0]
    location = first["loc"]
    field = str(location[0])
    if len(location) > 1:  # inside a list, or one of several types: describe the whole field
        return field, describe_type(hints[field])
    return field, first["msg"].removeprefix("Input should be ")


def nearest_position(path: KeyPath, positions: Positions, origin: str) -> str:
    """Return the position of the key, or of the nearest enclosing key that has one, or `origin`.

    >>> nearest_position(("data", "path"), {("data",): "c.yaml:3"}, "c.yaml")
    'c.yaml:3'
    """
    for length in range(len(path), 0, -1):
        if path[:length] in positions:
            return positions[path[:length]]
    return origin


def check_key(
    key: str,
    known: Collection[str],
    position: str,
    problem: str,
    other_names: Mapping[str, str] | None = None,
) -> None:
    """Raise UserError with the most similar known key unless `key` is known.

    `problem` begins the sentence, for example "training has no key".
    """
    if key in known:
        return
    similar = difflib.get_close_matches(str(key), known, n=1)
    if other_names and key in other_names:
        hint = other_names[key]
    elif similar:
        hint = f"did you mean {similar[0]}?"
    else:
        hint = f"the choices are {', '.join(known)}"
    raise UserError(f"{position}: {problem} {key!r}; {hint}")


def describe_type(hint: Any) -> str:
    """Return a type in words.

    >>> describe_type(int | typing.Literal["auto"])
    "an integer or 'auto'"
    """
    names = {int: "an integer", float: "a number", str: "a string", types.NoneType: "null"}
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe_type(part) for part in parts)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(part) for part in parts)
    return names.get(hint, str(hint))
