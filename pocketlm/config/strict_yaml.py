"""YAML read strictly, with the place of every key, and values built into dataclasses."""

import difflib
import json
import re
import typing
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from pocketlm.config.sections import SECTIONS, MixtureConfig
from pocketlm.errors import FieldError, UserError


class Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 3e-4 is a number, 010 is ten, `no` and 12:30 are text."""

    yaml_implicit_resolvers: dict = {}


class Dumper(yaml.SafeDumper):
    """Quotes the texts that Loader would take for something else."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


SCALARS = {  # tag: pattern, first characters, meaning
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text[0] in "tT"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
    "int": (r"[-+]?[0-9]+", "-+0123456789", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
    "str": (r"(?s:.*)", None, str),
}


for tag, (pattern, first, _) in SCALARS.items():
    if first:
        Loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first)
        )


def parse_yaml(text: str, place: str) -> tuple[Any, dict[tuple[str, ...], str]]:
    """The value of a YAML text in plain types, and for the path of each key and list item its place, as `file:line`.

    Nothing but mappings, lists and scalars is built: no aliases, no other tags, no duplicate keys, no depth beyond 9.
    """
    places: dict[tuple[str, ...], str] = {}

    def refuse(node: yaml.Node | yaml.Event, reason: str) -> UserError:
        return UserError(f"{place}:{node.start_mark.line + 1}: {reason}")

    def build(node: yaml.Node, path: tuple[str, ...]) -> Any:
        places[path] = f"{place}:{node.start_mark.line + 1}"
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if len(path) == 10:
            raise refuse(node, "this is nested more than 9 deep")
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [build(item, (*path, str(index))) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            values = {}
            for key, value in node.value:
                at = (*path, str(key.value))
                if at in places:
                    raise refuse(key, f"{'.'.join(at)} stands already at {places[at]}; remove one")
                values[str(key.value)] = build(value, at)
                places[at] = f"{place}:{key.start_mark.line + 1}"
            return values
        if (
            not isinstance(node, yaml.ScalarNode)
            or kind not in SCALARS
            or not re.fullmatch(SCALARS[kind][0], node.value)
        ):
            raise refuse(
                node,
                f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} does not go with this value",
            )
        try:
            node.value.encode()
            return SCALARS[kind][2](node.value)
        except ValueError as error:  # half a character, or thousands of digits
            raise refuse(node, f"not a value: {error}") from None

    try:
        if (
            alias := next(
                (e for e in yaml.parse(text, Loader) if isinstance(e, yaml.AliasEvent)), None
            )
        ) is not None:
            raise refuse(alias, "aliases (*name) are not used here; write the value out")
        node = yaml.compose(text, Loader)
        return (None if node is None else build(node, ())), places
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{place}{line}: not valid YAML: {reason}") from error
    except RecursionError:
        raise UserError(f"{place}: not valid YAML: nested too deep") from None


@cache
def types_of(kind: type, keys: tuple[str, ...]) -> type[BaseModel]:
    """What pydantic checks the given keys of a dataclass against."""
    hints = typing.get_type_hints(kind)
    return create_model(
        kind.__name__,
        __config__=ConfigDict(strict=True),
        **{key: (hints[key], ...) for key in keys},
    )


def build(
    kind: type, given: Any, path: tuple[str, ...], places: dict[tuple[str, ...], str], origin: str
) -> Any:
    """The dataclass `kind` from plain values, which stand at `path` in the config; the parts of a mixture likewise."""
    name = ".".join(path)

    def place(*key: str) -> str:
        return next(
            (places[at] for at in ((*path, *key), path[:2], path[:1]) if at in places), origin
        )

    if not isinstance(given, dict):
        raise UserError(f"{place()}: {name} is a section with keys of its own, not {given!r}")
    hints = typing.get_type_hints(kind)
    for key in given:
        check_key(key, list(hints), place(str(key)), name)
    values = dict(given)
    if isinstance(parts := values.pop("mixture", None), list):
        values["mixture"] = tuple(
            build(MixtureConfig, part, (*path, "mixture", str(i)), places, origin)
            for i, part in enumerate(parts)
        )
    elif parts is not None:
        raise UserError(
            f"{place('mixture')}: {name}.mixture is a list of sources, each with its weight, not {parts!r}"
        )
    plain = {key: value for key, value in values.items() if key != "mixture"}
    try:
        checked = types_of(kind, tuple(plain)).model_validate_json(json.dumps(plain))
    except ValidationError as error:
        first = error.errors()[0]
        key = first["loc"][0]
        said = (
            first["msg"].removeprefix("Input should be ")
            if len(first["loc"]) == 1
            else str(hints[key])
        )
        raise UserError(
            f"{place(key)}: {name}.{key} is {given[key]!r}; it should be {said}"
        ) from None
    try:
        return kind(**values | {k: getattr(checked, k) for k in plain})
    except FieldError as error:
        raise UserError(f"{place(error.field)}: {name}.{error}") from None


ELSEWHERE = {  # what other programs call a key: nanoGPT, Hugging Face, llm-mini
    "n_layer": "model.n_layers", "num_hidden_layers": "model.n_layers", "n_head": "model.n_heads", "num_attention_heads": "model.n_heads",
    "num_key_value_heads": "model.n_kv_heads", "n_embd": "model.d_model", "hidden_size": "model.d_model",
    "intermediate_size": "model.d_ff", "tie_word_embeddings": "model.tie_embeddings", "block_size": "training.seq_len",
    "batch_size": "training.micro_batch_size", "gradient_accumulation_steps": "training.grad_accum_steps",
    "learning_rate": "training.lr", "min_lr": "training.min_lr_ratio, a share of the peak", "max_iters": "training.max_steps",
    "warmup_iters": "training.warmup_steps", "warmup_ratio": "training.warmup_steps, a number of steps",
    "eval_interval": "training.val_every_steps", "log_interval": "training.log_every_steps", "save_every": "training.save_every_steps",
    "out_dir": "run.name", "dtype": "training.precision", "device": "hardware.accelerator", "dataset": "data.source",
    "config": "data.config_name", "tokenizer_name": "data.tokenizer", "pack_sequences": "data.packing",
    "train_docs": "data.path, of a file that holds so many", "val_docs": "data.val_share",
    "early_stopping": "not there: best.ckpt is the checkpoint of the lowest validation loss",
    "reduce_on_plateau": "not there: training.schedule says how the rate falls", "swa_window": "not there: attention is full",
}  # fmt: skip


def check_key(key: str, known: list[str], place: str, section: str = "") -> None:
    """Raise UserError with the nearest known key unless `key` is one."""
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        if key in ELSEWHERE and section in SECTIONS:
            hint = f"here that is {ELSEWHERE[key]}"
        what = f"{section} has no key {key!r}" if section else f"there is no section {key!r}"
        raise UserError(f"{place}: {what}; {hint}")
