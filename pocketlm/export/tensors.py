"""The tensors of a model in a foreign layout, made one at a time, and safetensors files of them."""

import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from pocketlm.conversion.layout import Layout
from pocketlm.conversion.stored import progress_bar


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor to be written: its name and shape, and how to compute it in float32."""

    name: str
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        return 4 * math.prod(self.shape)


def foreign_tensors(model: Transformer, layout: Layout) -> list[ForeignTensor]:
    """Return the tensors of a layout from the parameters of the model: `Layout.convert` undone."""
    ours: dict[str, list[str]] = {}  # q, k and v, in this order, may be fused
    for name, _ in model.named_parameters():
        ours.setdefault(layout.foreign_name(name), []).append(name)
    tensors = []
    for foreign, names in ours.items():
        parts = [model.get_parameter(name) for name in names]
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        if is_transposed(layout, names[0], len(shape)):
            shape = shape[::-1]
        tensors.append(ForeignTensor(foreign, shape, computation(model, layout, names)))
    return tensors


def is_transposed(layout: Layout, name: str, n_dimensions: int) -> bool:
    return layout.transposed and name.startswith("layers.") and n_dimensions == 2


def computation(model: Transformer, layout: Layout, names: list[str]) -> Callable[[], Tensor]:
    """Return a function that computes the foreign tensor of these parameters."""

    def compute() -> Tensor:
        parts = [model.get_parameter(name).detach() for name in names]
        if layout.interleaved:
            parts = [interleaved(*each, model.config) for each in zip(names, parts, strict=True)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole.T if is_transposed(layout, names[0], whole.dim()) else whole).contiguous()

    return compute


def interleaved(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Return q or k with neighbours as RoPE's pairs, (x[2i], x[2i + 1]); others as they are."""
    projection = re.search(r"([qk])_proj", name)
    if projection is None:
        return tensor
    n_heads = config.n_heads if projection[1] == "q" else config.n_kv_heads
    assert n_heads is not None
    halves = tensor.reshape(n_heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def computed(tensors: list[ForeignTensor]) -> Iterator[tuple[ForeignTensor, Tensor]]:
    """Yield each tensor with its values, which the caller drops; show a bar from 1 GB on."""
    with progress_bar("writing", [tensor.shape for tensor in tensors]) as advance:
        for tensor in tensors:
            yield tensor, tensor.compute()
            advance(tensor.n_bytes)


def write_safetensors(path: Path, tensors: list[ForeignTensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, one tensor at a time; the library's writer copies all of them.

    It is the length of a JSON header in 8 bytes, the header, and the values:
    https://huggingface.co/docs/safetensors
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.n_bytes
        header[tensor.name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the values are aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _, values in computed(tensors):
            file.write(values.numpy().data)


def in_shards(tensors: list[ForeignTensor], max_bytes: int) -> list[list[ForeignTensor]]:
    """Return the tensors in groups of at most so many bytes; a larger tensor is alone."""
    shards: list[list[ForeignTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    return shards
