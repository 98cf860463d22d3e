"""A model that others have trained, in our terms: where the directions of conversion meet.

    a file of theirs -> its settings, its tensors, a Layout that says where ours are in them -> assemble -> Pretrained

What model.py cannot express is refused by name, and so is a tensor that is missing, left over or misshapen.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import Config, TrainingConfig
from pocketlm.errors import UserError
from pocketlm.tokenizer.bpe import JsonTokenizer

Tensors = dict[str, Tensor]


Values = dict[str, Any]


@dataclass(frozen=True)
class Pretrained:
    """A model and what belongs to it, in our terms; the directions of conversion meet here."""

    config: Config
    weights: Tensors  # by the names of model.py
    tokenizer: JsonTokenizer
    chat_template: str | None  # Jinja


@dataclass(frozen=True)
class Layout:
    """How others store the tensors of model.py."""

    names: dict[
        str, str
    ]  # ours: theirs, where they differ; of modules within a layer, of those outside, and of `layers`
    prefix: str = ""  # before every name but the head's; left out in files that hold no head
    transposed: bool = False  # the layers' matrices are (in, out)
    fused: bool = False  # q, k and v are one tensor
    interleaved: bool = (
        False  # RoPE turns neighbours, (x[2i], x[2i + 1]), where ours turns (x[i], x[i + D/2])
    )
    buffers: str = "(?!)"  # pattern of what is no parameter

    def name(self, ours: str) -> str:
        """Their name of our parameter."""
        layer, module, kind = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(\w+)", ours).groups()
        place = "" if layer is None else f"{self.names.get('layers', 'layers')}.{layer}."
        return f"{'' if module == 'lm_head' else self.prefix}{place}{self.names.get(module, module)}.{kind}"

    def part(self, ours: str, tensor: Tensor, config: ModelConfig) -> Tensor:
        """Our parameter out of their tensor."""
        projection = re.search(r"([qkv])_proj", ours)
        if self.transposed and ours.startswith("layers.") and tensor.dim() == 2:
            tensor = tensor.T
        if self.fused and projection:
            tensor = tensor.chunk(3)["qkv".index(projection[1])]
        if self.interleaved and projection and projection[1] in "qk":
            heads = config.n_heads if projection[1] == "q" else config.n_kv_heads
            tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
        return tensor.float().contiguous()

    def weights(self, tensors: Tensors, config: ModelConfig, origin: str) -> Tensors:
        """All of our parameters out of all of their tensors. Raises UserError that names the tensor that does not fit."""
        with torch.device("meta"):
            expected = {name: p.shape for name, p in Transformer(config).named_parameters()}
        left_over = {name for name in tensors if not re.fullmatch(self.buffers, name)} - {
            self.name(ours) for ours in expected
        }
        if left_over:
            raise UserError(
                f"{origin} has the tensor {min(left_over)}, for which this model has no place; it cannot be converted"
            )
        weights = {}
        for ours, shape in expected.items():
            name = self.name(ours)
            if name not in tensors:
                raise UserError(
                    f"{origin} has no tensor {name}, which its config asks for; fetch or save the model again"
                )
            try:
                weights[ours] = self.part(ours, tensors[name], config)
            except (RuntimeError, IndexError):  # not to be cut so
                weights[ours] = None
            if (
                weights[ours] is None
                or weights[ours].shape != shape
                or not tensors[name].is_floating_point()
            ):
                found = f"{tensors[name].dtype} of {tuple(tensors[name].shape)}, which does not make {ours} of {tuple(shape)}"
                raise UserError(
                    f"{origin}: the tensor {name} is {found}; fetch or save the model again"
                )
        return weights


def drop_second_copy(tensors: Tensors, head: str, embedding: str) -> bool:
    """Whether the head is the embedding: it is not there, or is the same numbers again, which are dropped."""
    if head in tensors and embedding in tensors and torch.equal(tensors[head], tensors[embedding]):
        del tensors[head]
    return head not in tensors


def assemble(
    settings: Values,
    tensors: Tensors,
    layout: Layout,
    tokenizer: JsonTokenizer,
    template: str | None,
    origin: str,
) -> Pretrained:
    """The model of these settings with these tensors. Raises UserError where one of the parts does not fit the others."""
    seq_len = min(settings["max_seq_len"], TrainingConfig.seq_len)
    config = config_from_dict(
        {
            "model": settings,
            "data": {"tokenizer": tokenizer.name},
            "training": {"seq_len": seq_len},
        },
        origin=origin,
    )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{origin}: the tokenizer has {tokenizer.vocab_size:,} entries and the model {config.model.vocab_size:,}; "
            "save the two as they belong together"
        )
    return Pretrained(config, layout.weights(tensors, config.model, origin), tokenizer, template)


# ---- settings of theirs ----------------------------------------------------------------------------------------------

OF_GPT2 = {
    "mlp": "gelu",
    "position": "learned",
    "norm": "layernorm",
    "bias": True,
    "n_kv_heads": None,
}


NOUNS = {int: "a whole number above 0", float: "a number", list: "a list", dict: "an object"}


def require_key(values: Values, key: str, kind: type, origin: str) -> Any:
    """What a key says, which has to be there."""
    if not isinstance(value := values.get(key), kind) or kind is int and value < 1:
        raise UserError(
            f"{origin}: {key} is {value!r}, where a model needs {NOUNS[kind]}; fetch or save the model again"
        )
    return value


def require_supported(values: Values, origin: str, allowed: dict[str, tuple]) -> None:
    """Raise UserError where a key is there and says what this model cannot express."""
    for key, known in allowed.items():
        if (value := values.get(key, known[0])) not in known:
            wanted = " or ".join("left out" if each is None else repr(each) for each in known)
            raise UserError(
                f"{origin}: {key} is {value!r}, which this model cannot express; it would have to be {wanted}"
            )
