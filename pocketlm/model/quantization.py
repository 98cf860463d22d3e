"""Layers with int8 or int4 weights, and `quantize`, which replaces a model's layers by them.

Layers with bfloat16 weights that compute in float32, and `without_bfloat16_products`, which uses
them.

int8: one scale per output row (symmetric). int4: one scale and one minimum per group of 32 inputs.
The arithmetic of activations stays in floating point. pocketlm/inference/decode.c computes with the
same layouts.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Transformer
from pocketlm.errors import UserError
from pocketlm.instruction_sets import multiplies_bfloat16

QUANTIZED_DTYPES = ("int8", "int4")

INT4_GROUP_SIZE = 32  # inputs that share a scale and a minimum; GROUP in decode.c

# Up to this many rows, torch's packed matmul is faster than a matmul with the unpacked matrix.
PACKED_MATMUL_MAX_ROWS = 16


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise (out, in) to int8 of the same shape and float32 scales (out,).

    >>> q, scale = quantize_int8(torch.tensor([[0.5, -1.27, 0.01]]))
    >>> q.tolist(), round(scale.item(), 4)
    ([[50, -127, 1]], 0.01)
    """
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise (out, in) to packed int16 words (out, in / 4); see `pack_int4`.

    Also return the bfloat16 scale and minimum of each group, stacked: (out, in / 32, 2).
    """
    groups = torch.unflatten(weight.float(), 1, (-1, INT4_GROUP_SIZE))
    minimum = groups.amin(-1).bfloat16()
    scale = ((groups.amax(-1) - minimum.float()) / 15).clamp(min=1e-12).bfloat16()
    q = ((groups - minimum.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15)
    return pack_int4(q.flatten(1)), torch.stack([scale, minimum], -1)


def pack_int4(q: Tensor) -> Tensor:
    """Pack integers from 0 to 15, (out, in), into int16 words (out, in / 4).

    Of each 64 inputs, word j holds those at positions j, j + 16, j + 32 and j + 48, from the lowest
    four bits up.
    """
    planes = torch.unflatten(q.to(torch.int32), 1, (-1, 4, 16))
    words = planes[:, :, 0] | planes[:, :, 1] << 4 | planes[:, :, 2] << 8 | planes[:, :, 3] << 12
    return words.flatten(1).to(torch.int16)  # values above 32,767 wrap around


def unpack_int4(words: Tensor) -> Tensor:
    """Undo `pack_int4`; the result is int16."""
    shifts = torch.tensor([0, 4, 8, 12], dtype=torch.int16, device=words.device)[:, None]
    q: Tensor = torch.unflatten(words, 1, (-1, 1, 16)) >> shifts & 15
    return q.flatten(1)


class QuantizedLayer(nn.Module):
    """A layer whose weight is not of the dtype it computes in: integers, or bfloat16.

    `.to(dtype)` sets the dtype of its outputs; its own weight and scales stay as they are.
    """

    dtype: torch.dtype
    weight: Tensor
    scale: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLayer":
        """Move the layer; nn.Module.to calls this."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(torch.empty(0, device=buffer.device)).device)
        return self


class QuantizedLinear(QuantizedLayer):
    """x -> x weight^T + bias, with a weight quantised by `quantizer`."""

    quantizer: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.dtype = linear.weight.dtype
        weight, scale = type(self).quantizer(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def matrix(self) -> Tensor:
        """Return the weight (out, in) in floating point."""
        raise NotImplementedError

    def bias_as(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), self.bias_as(x.dtype))


class BFloat16Linear(QuantizedLinear):
    """A linear layer with a bfloat16 weight, the same tensor as that of the layer it replaces."""

    @staticmethod
    def quantizer(weight: Tensor) -> tuple[Tensor, None]:
        return weight.bfloat16(), None

    def matrix(self) -> Tensor:
        return self.weight.to(self.dtype)


class Int8Linear(QuantizedLinear):
    """A linear layer with an int8 weight (out, in) and a float32 scale (out,)."""

    scale: Tensor
    quantizer = staticmethod(quantize_int8)

    def matrix(self) -> Tensor:
        return (self.weight * self.scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias_as(x.dtype)
        rows, width = x.numel() // x.size(-1), x.size(-1)
        # torch's packed matmul reads past the end of rows of other widths, and with float32 it is
        # ten times slower.
        packed = x.device.type == "cpu" and x.dtype == torch.bfloat16 and width % 32 == 0
        if rows > PACKED_MATMUL_MAX_ROWS or not packed:
            return F.linear(x, self.matrix(), bias)
        x_rows, scale = x.reshape(rows, -1), self.scale.bfloat16()
        y = torch._weight_int8pack_mm(x_rows, self.weight, scale).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


class Int4Linear(QuantizedLinear):
    """A linear layer with a packed weight (out, in / 4) and scales and minima (out, in / 32, 2)."""

    scale: Tensor
    quantizer = staticmethod(quantize_int4)

    def matrix(self) -> Tensor:
        groups = torch.unflatten(unpack_int4(self.weight), 1, (-1, INT4_GROUP_SIZE))
        scale, minimum = self.scale.to(self.dtype)[..., None].unbind(-2)  # (out, groups, 1)
        return (groups * scale + minimum).flatten(1)


class QuantizedEmbedding(QuantizedLayer):
    """Token ids -> rows of an int8 or bfloat16 matrix, which a tied head shares."""

    def __init__(self, matrix: QuantizedLinear):
        super().__init__()
        self.dtype = matrix.dtype
        self.register_buffer("weight", matrix.weight)
        self.register_buffer("scale", matrix.scale)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight[ids]
        return (rows if self.scale is None else rows * self.scale[ids][..., None]).to(self.dtype)


def quantize(model: Transformer, dtype: str) -> Transformer:
    """Replace the model's matrices by quantised layers, in place, and return the model.

    With int4, the embedding, the head, and layers whose width 64 does not divide become int8.
    Raises UserError if no layer would be int4.
    """
    assert dtype in QUANTIZED_DTYPES
    linear_layers = [m for m in model.layers.modules() if isinstance(m, nn.Linear)]
    if dtype == "int4" and all(linear.in_features % 64 for linear in linear_layers):
        widths = sorted({linear.in_features for linear in linear_layers})
        raise UserError(
            "int4 needs widths that 64 divides, and this model's are "
            f"{' and '.join(map(str, widths))}; use int8"
        )
    layer = {"int8": Int8Linear, "int4": Int4Linear}[dtype]
    return replace_layers(model, layer, Int8Linear)


def without_bfloat16_products(model: Transformer) -> Transformer:
    """Return the model, or one that computes in float32 if the CPU does not multiply bfloat16.

    They share the bfloat16 matrices, which are widened for each product.
    """
    slow = model.device.type == "cpu" and not multiplies_bfloat16("cpu")
    if model.dtype != torch.bfloat16 or not slow:
        return model
    shared = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    shared += [b for m in model.modules() if isinstance(m, QuantizedLayer) for b in m.buffers()]
    memo = {id(tensor): tensor for tensor in (*shared, model.embed_tokens.weight)}
    copy = deepcopy(model, memo)
    if not isinstance(model.embed_tokens, QuantizedLayer):
        replace_layers(copy, BFloat16Linear, BFloat16Linear)
    return copy.float()


def replace_layers(
    model: Transformer, block_layer: type[QuantizedLinear], layer: type[QuantizedLinear]
) -> Transformer:
    """Replace the linear layers of the blocks, and the embedding and the head, in place."""
    for block in model.layers:
        for part in (block.self_attn, block.mlp):
            replace_linear_layers(part, block_layer)
    # The layers below have the interface of those that they replace.
    embedding = layer(as_linear(model.embed_tokens.weight))
    head = embedding if model.lm_head is None else layer(model.lm_head)
    model.lm_head = head  # type: ignore[assignment]
    model.embed_tokens = QuantizedEmbedding(embedding)  # type: ignore[assignment]
    return model


def replace_linear_layers(parent: Any, layer: type[QuantizedLinear]) -> None:
    """Replace the linear layers that are children of the module `parent`."""
    for name, child in list(parent.named_children()):
        if isinstance(child, nn.Linear):
            fits = layer is not Int4Linear or child.in_features % 64 == 0
            setattr(parent, name, layer(child) if fits else Int8Linear(child))


def as_linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer without bias that has this weight, not a copy of it."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def weight_bytes(model: Transformer) -> int:
    """Return the size of all weights in bytes; a shared one counts once."""
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    return sum(sizes.values())
