"""A pretrained model in our terms: config, weights, tokenizer and chat template.

    a foreign file -> its settings, its tensors, a Layout -> assemble -> Pretrained

The readers of each file format end in `assemble`. Whatever model.py cannot express is refused by
name, and so is a tensor that is missing, unexpected or of the wrong shape.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import Config, TrainingConfig
from pocketlm.conversion.stored import StoredTensors, is_finite, progress_bar
from pocketlm.errors import UserError
from pocketlm.hub.special_tokens import vocabulary
from pocketlm.tokenizer.bpe import JsonTokenizer

Tensors = dict[str, Tensor]
Values = dict[str, Any]

NO_TENSOR = "(?!)"  # a pattern that nothing matches


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model and what belongs to it, in our terms."""

    config: Config
    weights: Tensors  # by the names of model.py
    tokenizer: JsonTokenizer
    chat_template: str | None  # Jinja
    notes: tuple[str, ...] = ()  # for the user: what was read in an unexpected place, or left out


@dataclass(frozen=True)
class Source:
    """Contents of a model file besides its tensors."""

    origin: str  # the file or folder, for messages
    settings: Values  # our model section
    tokenizer: JsonTokenizer
    chat_template: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Names and storage of the tensors of model.py in a foreign format."""

    # our name -> foreign name, where they differ: of `layers`, of modules in a layer and outside
    names: dict[str, str]
    prefix: str = ""  # before every name except the head's; absent in files without a head
    transposed: bool = False  # matrices of the layers are (in, out)
    fused: bool = False  # q, k and v are one tensor
    # RoPE rotates neighbours (x[2i], x[2i + 1]); model.py rotates (x[i], x[i + D/2])
    interleaved: bool = False
    buffers: str = NO_TENSOR  # pattern of tensors that are not parameters

    def foreign_name(self, name: str) -> str:
        """Return the foreign name of our parameter."""
        match = re.fullmatch(r"(?:layers\.(\d+)\.)?(?:(.+)\.)?(\w+)", name)
        assert match is not None
        layer, module, kind = match.groups()
        prefix = "" if module == "lm_head" else self.prefix
        if layer is not None:
            prefix += f"{self.names.get('layers', 'layers')}.{layer}."
        return prefix + (f"{self.names.get(module, module)}.{kind}" if module else kind)

    def convert_tensor(self, name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
        """Return our parameter `name` from the foreign tensor, in float32."""
        projection = re.search(r"([qkv])_proj", name)
        if self.transposed and name.startswith("layers.") and tensor.dim() == 2:
            tensor = tensor.T
        if self.fused and projection:
            tensor = tensor.chunk(3)["qkv".index(projection[1])]
        if self.interleaved and projection and projection[1] in "qk":
            n_heads = config.n_heads if projection[1] == "q" else config.n_kv_heads
            assert n_heads is not None
            pairs = tensor.reshape(n_heads, -1, 2, *tensor.shape[1:])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        tensor = tensor.float().contiguous()
        # a part of a larger tensor, or of a file that is mapped, would keep the memory of all of it
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor

    def convert(self, tensors: StoredTensors, config: ModelConfig, origin: str) -> Tensors:
        """Return all our parameters. Raises UserError that names the first tensor that is wrong."""
        shapes = {name: p.shape for name, p in config.on_meta_device().named_parameters()}
        known = {self.foreign_name(name) for name in shapes}
        unexpected = {
            name for name in tensors if name not in known and not re.fullmatch(self.buffers, name)
        }
        if unexpected:
            raise UserError(
                f"{origin}: unexpected tensor {min(unexpected)}: "
                "this architecture has no such parameter, so the model cannot be converted"
            )
        weights = {}
        with progress_bar("reading", shapes.values()) as advance:
            for name, shape in shapes.items():
                weights[name] = self.convert_stored(name, shape, tensors, config, origin)
                advance(weights[name].nbytes)
        return weights

    def convert_stored(
        self,
        name: str,
        shape: torch.Size,
        tensors: StoredTensors,
        config: ModelConfig,
        origin: str,
    ) -> Tensor:
        """Return our parameter. Raises UserError if there is none, or if it is no such tensor."""
        foreign = self.foreign_name(name)
        if foreign not in tensors:
            raise UserError(
                f"{origin} has no tensor {foreign}, which its config requires; "
                "download or save the model again"
            )
        tensor = tensors[foreign]
        weight = self.convert_checked(name, shape, tensor, config)
        if weight is None:
            raise UserError(
                f"{origin}: the tensor {foreign} is {tensor.dtype} of {tuple(tensor.shape)}, "
                f"which does not make {name} of {tuple(shape)}; "
                "download or save the model again"
            )
        if not is_finite(weight):
            raise UserError(
                f"{origin}: the tensor {foreign} has weights that are not finite; "
                "use an earlier state of the model"
            )
        return weight

    def convert_checked(
        self, name: str, shape: torch.Size, tensor: Tensor, config: ModelConfig
    ) -> Tensor | None:
        """Return our parameter; None if the tensor is not of real numbers or of a wrong shape."""
        if not tensor.is_floating_point():
            return None
        try:
            weight = self.convert_tensor(name, tensor, config)
        except (RuntimeError, IndexError):  # it cannot be split into parts or heads
            return None
        return weight if weight.shape == shape else None


def resolve_tied_head(
    tensors: StoredTensors, layout: Layout, tied: bool | None, origin: str
) -> tuple[bool, list[str]]:
    """Return whether the output head is the embedding, and notes; keep one tensor if it is.

    tied: what the model's config says; None if the format does not say it. A tied matrix may be
    stored under either name, or twice. As in transformers, a head that differs is not tied.
    """
    embedding = layout.foreign_name("embed_tokens.weight")
    head = layout.foreign_name("lm_head.weight")
    if tied is False:
        return False, []
    if head in tensors and embedding not in tensors:
        tensors[embedding] = tensors.pop(head)
        found = [f"{origin} stores {head} and no {embedding}: it is both"] if tied is None else []
        return True, found
    if head in tensors and torch.equal(tensors[head], tensors[embedding]):
        del tensors[head]
    if head not in tensors:
        return True, []
    if tied is None:
        return False, []
    return False, [
        f"{origin} has a {head} that differs from {embedding}, though its config says "
        "tie_word_embeddings: they are not tied, as in transformers"
    ]


def assemble(source: Source, tensors: StoredTensors, layout: Layout) -> Pretrained:
    """Return the model. Raises UserError if its parts do not fit together."""
    settings, origin = source.settings, source.origin
    sections = {
        "model": settings,
        "data": {"tokenizer": source.tokenizer.name},
        "training": {"seq_len": min(settings["max_seq_len"], TrainingConfig.seq_len)},
    }
    config = config_from_dict(sections, origin=origin)
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    tokenizer, left_out = without_tokens_beyond(source.tokenizer, vocab_size, origin)
    weights = layout.convert(tensors, config.model, origin)
    notes = [*source.notes, *left_out, *filter(None, [tokenizer.note])]
    return Pretrained(config, weights, tokenizer, source.chat_template, tuple(notes))


def without_tokens_beyond(
    tokenizer: JsonTokenizer, vocab_size: int, origin: str
) -> tuple[JsonTokenizer, list[str]]:
    """Return the tokenizer without added tokens beyond the model's vocabulary, and a note.

    Tools add such tokens, above all one for padding, without a row for them in the embedding.
    Raises UserError for a token that text is made of.
    """
    if tokenizer.vocab_size <= vocab_size:
        return tokenizer, []
    spec = json.loads(tokenizer.backend.to_str())
    beyond = {t["content"]: t["id"] for t in spec["added_tokens"] if t["id"] >= vocab_size}
    for token, i in vocabulary(spec).items():
        if i >= vocab_size and token not in beyond:
            raise UserError(
                f"{origin}: the vocabulary of the tokenizer has {tokenizer.vocab_size:,} tokens "
                f"and that of the model {vocab_size:,}; save the two that belong together: "
                f"{token!r} with the id {i:,} is part of texts"
            )
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in beyond]
    if isinstance(spec["model"]["vocab"], dict):
        spec["model"]["vocab"] = {
            token: i for token, i in spec["model"]["vocab"].items() if token not in beyond
        }

    def known(i: int | None) -> int | None:
        return None if i in beyond.values() else i

    special = replace(
        tokenizer.special,
        separator_id=known(tokenizer.separator_id),
        end_ids=tuple(i for i in tokenizer.end_ids if i not in beyond.values()),
        names={k: token for k, token in tokenizer.special_tokens.items() if token not in beyond},
    )
    bos_id, eos_id = known(tokenizer.bos_id), known(tokenizer.eos_id)
    names = ", ".join(f"{token!r} ({i})" for token, i in sorted(beyond.items()))
    note = f"{origin}: left out of the vocabulary, as the model has {vocab_size:,} tokens: {names}"
    smaller = JsonTokenizer(
        json.dumps(spec), tokenizer.name, bos_id, eos_id, tokenizer.note, special
    )
    return smaller, [note]


def choose_template(templates: dict[str, str], origin: str) -> tuple[str | None, list[str]]:
    """Return the chat template of those by name, and a note if none is called default."""
    if "default" in templates or not templates:
        return templates.get("default"), []
    names = ", ".join(sorted(templates))
    if len(templates) > 1:
        return None, [f"{origin} has chat templates called {names}, none called default: not used"]
    [template] = templates.values()
    return template, [f"{origin} has one chat template, called {names}, which is used"]


# ---- foreign settings ----

GPT2_SETTINGS = {
    "mlp": "gelu",
    "position": "learned",
    "norm": "layernorm",
    "bias": True,
    "n_kv_heads": None,
}

KIND_NAMES: dict[type, str] = {
    int: "a whole number above 0",
    float: "a number",
    bool: "true or false",
    str: "a name",
    list: "a list",
    dict: "an object",
}


def require_key(values: Values, key: str, kind: type, origin: str) -> Any:
    """Return the value of a key. Raises UserError if it is missing or of another type."""
    value: Any = values.get(key)
    is_positive = kind is not int or (isinstance(value, int) and value >= 1)
    if not isinstance(value, (int, float) if kind is float else kind) or not is_positive:
        raise UserError(
            f"{origin}: {key} is {value!r}, but a model needs {KIND_NAMES[kind]}; "
            "download or save the model again"
        )
    return value


def require_keys(values: Values, keys: dict[str, str], origin: str) -> dict[str, int]:
    """Return whole numbers above 0 by our names; `keys` has the foreign name of each."""
    return {ours: require_key(values, key, int, origin) for ours, key in keys.items()}


def unread_note(keys: Iterable[str], origin: str) -> list[str]:
    """Return a note on keys whose meaning is not known here; none if there are none."""
    names = ", ".join(sorted(keys))
    return [f"{origin} has keys that are not read: {names}"] if names else []


def require_supported(values: Values, supported: dict[str, tuple[Any, ...]], origin: str) -> None:
    """Raise UserError for the first key with a value that model.py cannot express.

    The first supported value of a key is the default; None means that the key is left out.
    """
    for key, choices in supported.items():
        value = values.get(key, choices[0])
        if value not in choices:
            names = ["left out" if choice is None else repr(choice) for choice in choices]
            raise UserError(
                f"{origin}: {key} is {value!r}, which this model cannot express; "
                f"it must be {' or '.join(names)}"
            )
