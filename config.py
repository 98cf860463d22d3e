"""The settings of a run: five frozen sections, and strict loading from YAML and `key=value`.

A file names only what differs from the defaults below, which are those of config.yaml. An unknown key, a wrong type, a
duplicate key or sizes that do not fit end in one sentence that names the file, the line, the value and the remedy.
"""

import dataclasses
import difflib
import json
import math
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, ValidationError, create_model

from errors import UserError
from model import ModelConfig


@dataclass(frozen=True)
class RunConfig:
    name: str = ""  # outputs go to checkpoints/<name> and logs/<name>; empty: straight into checkpoints and logs

    def __post_init__(self) -> None:
        if self.name.startswith((".", "old-")) or not all(c.isascii() and (c.isalnum() or c in "._-") for c in self.name):
            raise ValueError(f"name {self.name!r} is a folder's name: letters, digits, '.', '_', '-', not beginning '.' or 'old-'")


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from."""

    source: str = "wiki"  # a corpus by name: wiki, shakespeare, names, dialogue, sotu; or a Hugging Face dataset, OWNER/NAME
    path: str | None = None  # a file, a folder or a pattern; takes the place of `source`
    val_path: str | None = None  # the same, of which all is validation; None: val_share of the training text
    text_field: str = "text"  # the field of jsonl, csv, parquet and Hugging Face rows that holds a document
    separator: str | None = None  # between the documents of a text file: line, blank_line, or a text; None: a file is one
    errors: Literal["strict", "replace"] = "strict"  # of bytes that are not UTF-8: refuse, or put U+FFFD there
    config_name: str | None = None  # Hugging Face: configuration, also called subset
    split: str = "train"  # Hugging Face: split
    val_split: str | None = None  # Hugging Face: split of which all is validation; None: val_share of the training text
    revision: str | None = None  # Hugging Face: commit, tag or branch

    def __post_init__(self) -> None:
        if self.separator == "":
            raise ValueError("separator is empty; it is line, blank_line, a text, or null for one document a file")
        if self.val_split == self.split:
            raise ValueError(f"val_split {self.val_split!r} is the split to train on; name another, or leave it null")
        if self.val_path and self.val_path == self.path:
            raise ValueError(f"val_path {self.val_path!r} is the path to train on; name another, or leave it null")


@dataclass(frozen=True)
class MixtureConfig(SourceConfig):
    """One of several sources."""

    weight: float = 1.0  # its share of the rows, beside the other weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}; it must be above 0 and finite")


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    mixture: tuple[MixtureConfig, ...] = ()  # several sources at once; takes the place of the keys above
    tokenizer: str = "gpt2"  # byte, char, bpe:SIZE, gpt2, a tokenizer.json, a Hugging Face folder or name
    bos: bool | None = None  # a begin token before each document; None: where the tokenizer has one
    eos: bool | None = None  # an end token behind each document; None: where the tokenizer has one
    val_share: float = 0.05  # share of the documents (of a single document's end) kept for validation
    packing: Literal["packed", "padded"] = "packed"  # rows cut from one stream of tokens, or a document a row
    document_mask: bool = True  # tokens attend within their own document only
    streaming: bool = False  # tokenise while training, and keep no tokens on the disk but those of the first documents
    shuffle_buffer: int = 1000  # rows that streaming shuffles at a time, in each worker
    cache_dir: str = "data"  # fetched corpora and token shards

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share is {self.val_share}; it is a share between 0 and 1, for example 0.05")
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {self.shuffle_buffer}; it must be 1 or more")
        if self.mixture and self.path:
            raise ValueError(f"path {self.path!r} and mixture are both given; set the one that is not meant to null")
        if self.mixture and self.streaming:
            raise ValueError("streaming reads a single source; leave out streaming or mixture")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Where the documents come from: the parts of the mixture, or the one source."""
        return self.mixture or (self,)


@dataclass(frozen=True)
class TrainingConfig:
    seq_len: int = 256  # tokens in a row
    micro_batch_size: int = 8  # rows in one forward pass, on each device
    grad_accum_steps: int = 1  # forward passes in one optimizer step
    max_steps: int = 600  # optimizer steps
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: the blocks' matrices by Muon, the rest by AdamW
    lr: float = 6e-3  # peak learning rate
    min_lr_ratio: float = 0.0  # final learning rate as a share of the peak
    schedule: Literal["cosine", "linear", "constant"] = "linear"  # from the peak to the end
    warmup_steps: int = 30  # optimizer steps from 0 to the peak
    weight_decay: float = 0.1  # on matrices, not on norm gains
    betas: tuple[float, float] = (0.9, 0.998)  # AdamW
    eps: float = 1e-8  # AdamW
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clip
    loss_chunk: int = 1024  # tokens whose logits exist at a time; 0: all of them
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    seed: int = 42
    log_every_steps: int = 10  # optimizer steps between logged points
    val_every_steps: int = 100  # optimizer steps between validations
    save_every_steps: int = 100  # optimizer steps between checkpoints
    keep_checkpoints: int = 3  # numbered checkpoints kept, newest first; 0: all

    def __post_init__(self) -> None:
        for name in (
            "seq_len",
            "micro_batch_size",
            "grad_accum_steps",
            "max_steps",
            "log_every_steps",
            "val_every_steps",
            "save_every_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("min_lr_ratio", "warmup_steps", "weight_decay", "grad_clip", "loss_chunk", "keep_checkpoints", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more, and below 2^32")
        if not (0 < self.lr < math.inf and 0 < self.eps < math.inf):
            raise ValueError(f"lr {self.lr} and eps {self.eps} must be above 0 and finite")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; each lies from 0 to below 1")

    def validates(self, step: int) -> bool:
        """Whether a validation follows optimizer step `step`; one always follows the last."""
        return step % self.val_every_steps == 0 or step == self.max_steps


@dataclass(frozen=True)
class HardwareConfig:
    accelerator: Literal["auto", "cpu", "mps", "cuda", "gpu"] = "auto"  # auto: mps, else cuda, else cpu; gpu is cuda
    devices: int = 1  # how many of them
    num_workers: int = 0  # processes that prepare batches; 0: the training process itself
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA only

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"devices is {self.devices}; it must be 1 or more")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; it must be 0 or more")


SECTIONS = {"run": RunConfig, "model": ModelConfig, "data": DataConfig, "training": TrainingConfig, "hardware": HardwareConfig}


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        if self.model.max_seq_len is None:
            object.__setattr__(self, "model", dataclasses.replace(self.model, max_seq_len=self.training.seq_len))
        if self.model.max_seq_len < self.training.seq_len:
            raise ValueError(f"training.seq_len {self.training.seq_len} does not fit model.max_seq_len {self.model.max_seq_len}")

    def with_vocab_size(self, vocab_size: int) -> "Config":
        """This config for a tokenizer of `vocab_size`. Raises UserError where the model was given a smaller one."""
        given = self.model.vocab_size
        if given is not None and given < vocab_size:
            raise UserError(
                f"model.vocab_size is {given}, but the tokenizer {self.data.tokenizer!r} has {vocab_size} entries; leave it empty"
            )
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=given or vocab_size))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain dicts, lists, numbers and strings: what a checkpoint and YAML hold."""
        return {
            section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            for section, values in dataclasses.asdict(self).items()
        }


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
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


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
        if not isinstance(node, yaml.ScalarNode) or kind not in SCALARS or not re.fullmatch(SCALARS[kind][0], node.value):
            raise refuse(node, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} does not go with this value")
        try:
            node.value.encode()
            return SCALARS[kind][2](node.value)
        except ValueError as error:  # half a character, or thousands of digits
            raise refuse(node, f"not a value: {error}") from None

    try:
        if (alias := next((e for e in yaml.parse(text, Loader) if isinstance(e, yaml.AliasEvent)), None)) is not None:
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


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The defaults, changed by the file, changed by `section.key=value` overrides. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in [*Path().glob("*.yaml"), *Path("presets").glob("*.yaml")])
        raise UserError(f"there is no config {path}; here are {', '.join(near) or 'none'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from None
    values, places = parse_yaml(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config is a mapping of sections ({', '.join(SECTIONS)}), not {values!r}")
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise UserError(f"{override!r} is not an override; write section.key=value, for example training.max_steps=20")
        check_key(section, list(SECTIONS), f"on the command line: {key}")
        value = parse_yaml(value, f"on the command line: {key}")[0]
        if values.get(section) is None:
            values[section] = {}
        if isinstance(values[section], dict):  # else the file's mistake is told below
            values[section][name] = value
            places[section, name] = "on the command line"
    return config_from_dict(values, places, str(path))


def config_from_dict(values: dict[str, Any], places: dict[tuple[str, ...], str] | None = None, origin: str = "config") -> Config:
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


def build(kind: type, given: Any, path: tuple[str, ...], places: dict[tuple[str, ...], str], origin: str) -> Any:
    """The dataclass `kind` from plain values, which stand at `path` in the config; the parts of a mixture likewise."""
    name = ".".join(path)

    def place(*key: str) -> str:
        return next((places[at] for at in ((*path, *key), path[:2], path[:1]) if at in places), origin)

    if not isinstance(given, dict):
        raise UserError(f"{place()}: {name} is a section with keys of its own, not {given!r}")
    hints = typing.get_type_hints(kind)
    for key in given:
        check_key(key, list(hints), place(str(key)), name)
    values = dict(given)
    if isinstance(parts := values.pop("mixture", None), list):
        values["mixture"] = tuple(build(MixtureConfig, part, (*path, "mixture", str(i)), places, origin) for i, part in enumerate(parts))
    elif parts is not None:
        raise UserError(f"{place('mixture')}: {name}.mixture is a list of sources, each with its weight, not {parts!r}")
    plain = {key: value for key, value in values.items() if key != "mixture"}
    types = create_model(name, __config__=ConfigDict(strict=True), **{k: (hints[k], ...) for k in plain})
    try:
        checked = types.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        first = error.errors()[0]
        key = first["loc"][0]
        said = first["msg"].removeprefix("Input should be ") if len(first["loc"]) == 1 else str(hints[key])
        raise UserError(f"{place(key)}: {name}.{key} is {given[key]!r}; it should be {said}") from None
    try:
        return kind(**values | {k: getattr(checked, k) for k in plain})
    except ValueError as error:  # its first word is the key
        raise UserError(f"{place(str(error).split()[0])}: {name}.{error}") from None


def check_key(key: str, known: list[str], place: str, section: str = "") -> None:
    """Raise UserError with the nearest known key unless `key` is one."""
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        what = f"{section} has no key {key!r}" if section else f"there is no section {key!r}"
        raise UserError(f"{place}: {what}; {hint}")


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that loads back to the same."""
    return yaml.dump(config.to_dict(), Dumper=Dumper, sort_keys=False, default_flow_style=None)
