"""Layers whose weights have 8 or 4 bits."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Transformer
from pocketlm.errors import UserError

QUANTIZED = ("int8", "int4")


GROUP = 32  # inputs that share an int4 scale; decode.c says it too


FEW = 16  # rows up to which the packed matmul of torch is faster than to unpack the matrix and multiply by that


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> int8 of that shape, and (out,) scales in float32.

    >>> q, scale = quantize_int8(torch.tensor([[0.5, -1.27, 0.01]]))
    >>> q.tolist(), round(scale.item(), 4)
    ([[50, -127, 1]], 0.01)
    """
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> int16 words (out, in / 4) as `pack_int4` packs them; (out, in / 32, 2) scale and low in bfloat16."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low = groups.amin(-1).bfloat16()
    scale = ((groups.amax(-1) - low.float()) / 15).clamp(min=1e-12).bfloat16()
    q = ((groups - low.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15)
    return pack_int4(q.flatten(1)), torch.stack([scale, low], -1)


def pack_int4(q: Tensor) -> Tensor:
    """Numbers from 0 to 15, (out, in) -> (out, in / 4) int16: of each 64, word j holds those at j, j + 16, j + 32, j + 48."""
    planes = q.to(torch.int32).unflatten(1, (-1, 4, 16))
    words = planes[:, :, 0] | planes[:, :, 1] << 4 | planes[:, :, 2] << 8 | planes[:, :, 3] << 12
    return words.flatten(1).to(torch.int16)  # the upper half of the range wraps around


def unpack_int4(words: Tensor) -> Tensor:
    """The other way, to int16."""
    shifts = torch.tensor([0, 4, 8, 12], dtype=torch.int16, device=words.device)[:, None]
    return (words.unflatten(1, (-1, 1, 16)) >> shifts & 15).flatten(1)


class Quantized(nn.Module):
    """A matrix of integers. `.to(dtype)` sets the dtype of what it works on; its own numbers stay as they are."""

    dtype: torch.dtype

    def _apply(self, fn, recurse: bool = True) -> nn.Module:  # what nn.Module.to calls
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(torch.empty(0, device=buffer.device)).device)
        return self


class QuantizedLinear(Quantized):
    """x -> x weight^T + bias, by one of the functions above."""

    quantizer: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.dtype = linear.weight.dtype
        weight, scale = type(self).quantizer(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())


class Int8Linear(QuantizedLinear):
    """weight (out, in) int8, scale (out,) float32."""

    quantizer = staticmethod(quantize_int8)

    def matrix(self) -> Tensor:
        return (self.weight * self.scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows, n_in = x.numel() // x.size(-1), x.size(-1)
        # torch's packed matmul reads beyond the end of other widths, and with float32 it is ten times slower
        if rows > FEW or n_in % 32 or x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return F.linear(x, self.matrix(), bias)
        y = torch._weight_int8pack_mm(x.reshape(rows, -1), self.weight, self.scale.bfloat16()).view(
            *x.shape[:-1], -1
        )
        return y if bias is None else y + bias


class Int4Linear(QuantizedLinear):
    """weight (out, in / 4) words of four, scale (out, in / 32, 2) with the lows."""

    quantizer = staticmethod(quantize_int4)

    def matrix(self) -> Tensor:
        groups = unpack_int4(self.weight).unflatten(1, (-1, GROUP))
        scale, low = self.scale.to(self.dtype)[..., None].unbind(-2)  # (out, groups, 1)
        return (groups * scale + low).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), None if self.bias is None else self.bias.to(x.dtype))


class Int8Embedding(Quantized):
    """Ids -> rows of an int8 matrix; where the head is tied, of the head's."""

    def __init__(self, matrix: Int8Linear):
        super().__init__()
        self.dtype = matrix.dtype
        self.register_buffer("weight", matrix.weight)
        self.register_buffer("scale", matrix.scale)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.weight[ids] * self.scale[ids][..., None]).to(self.dtype)


def quantize(model: Transformer, dtype: str) -> Transformer:
    """Put integer matrices in the place of the model's own; it is the same model then. Raises UserError."""
    assert dtype in QUANTIZED
    if dtype == "int4" and all(
        module.in_features % 64
        for module in model.layers.modules()
        if isinstance(module, nn.Linear)
    ):
        raise UserError(
            f"int4 needs widths that 64 divides, and this model's are {model.config.d_model} and {model.config.d_ff}; use int8"
        )
    for layer in model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(
                        part,
                        name,
                        Int4Linear(module)
                        if dtype == "int4" and module.in_features % 64 == 0
                        else Int8Linear(module),
                    )
    embedding = Int8Linear(as_linear(model.embed_tokens.weight))
    model.lm_head = embedding if model.lm_head is None else Int8Linear(model.lm_head)
    model.embed_tokens = Int8Embedding(embedding)
    return model


def as_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def weight_bytes(model: Transformer) -> int:
    """What all weights take; a shared one counts once."""
    return sum(
        {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}.values()
    )
