"""Blocks and norms in training on a CPU: torch computes the matmuls, and training.c the rest.

`NativeBlock` computes what `Block.forward` of model.py does for RMSNorm, RoPE and SwiGLU, and its
gradient. The projections of queries, keys and values are one matmul, and so are gate and up.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pocketlm.model import kernels
from pocketlm.model.kernels import Dropout

NO_DROPOUT = Dropout()


class Documents(NamedTuple):
    """Positions and documents of the tokens of a batch, as training.c's attention reads them.

    cos, sin: RoPE's tables of all positions. starts (B, T): index of the first token of each
    token's document.
    """

    cos: Tensor
    sin: Tensor
    starts: Tensor


class Options(NamedTuple):
    """Constants of a block: eps of its norms, and what dropout drops in this step."""

    eps: float
    of_weights: Dropout = NO_DROPOUT  # of the attention weights
    of_attention: Dropout = NO_DROPOUT  # of what attention adds to the residual stream
    of_mlp: Dropout = NO_DROPOUT  # of what the MLP adds

    @classmethod
    def draw(cls, eps: float, dropout: float) -> "Options":
        """Return options with seeds of torch's generator, for a probability of dropout."""
        if not dropout:
            return cls(eps)
        seeds = torch.randint(2**32, (3,)).tolist()
        return cls(eps, *(Dropout(dropout, seed) for seed in seeds))


class NativeBlock(torch.autograd.Function):
    """The output (B, T, C) of a block for x (B, T, C), float32.

    weights: those of the norms and of q, k, v, o, gate, up and down, of QK-norm's two norms and of
    the value residual, float32; of the last three, None is one that the block lacks. first_values
    (B, T, K D): those of the first block, in the dtype of matmuls, for a value residual.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        documents: Documents,
        options: Options,
        first_values: Tensor | None,
        *weights: Any,
    ) -> Tensor:
        dtype = matmul_dtype(x)
        norm1, norm2, *matrices = weights[:9]
        ctx.rows = [len(matrix) for matrix in matrices[:3]]
        ctx.options = options
        eps = options.eps
        with torch.autocast("cpu", enabled=False):  # `dtype` decides
            q, k, v, o, gate, up, down = matrices
            qkv_weight, gate_up_weight = (
                torch.cat([q, k, v]).to(dtype),
                torch.cat([gate, up]).to(dtype),
            )
            o, down = o.to(dtype), down.to(dtype)
            x = x.reshape(-1, x.size(-1)).contiguous()
            normed, inverse_rms = kernels.norm(x, norm1, eps, dtype)
            qkv = normed @ qkv_weight.T
            inputs = kernels.AttentionInputs._make((qkv, *documents, *weights[9:], first_values))
            n_heads = len(q) // documents.cos.size(1)
            y, log_sums = kernels.attention(inputs, n_heads, eps, options.of_weights)
            attended = kernels.drop_(y @ o.T, options.of_attention)
            x2, normed2, inverse_rms2 = kernels.add_norm(x, attended, norm2, eps, dtype)
            gate_up = normed2 @ gate_up_weight.T
            hidden = kernels.swiglu(gate_up)
            output = add_product(x2, hidden, down.T, options.of_mlp)
        ctx.save_for_backward(
            *(norm1, norm2, qkv_weight, o, gate_up_weight, down),
            *(x, normed, inverse_rms, y, log_sums),
            *(x2, normed2, inverse_rms2, gate_up, hidden),
            *inputs,
        )
        return output.view(*documents.starts.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        norm1, norm2, qkv_weight, o, gate_up_weight, down, *kept = ctx.saved_tensors
        x, normed, inverse_rms, y, log_sums, x2, normed2, inverse_rms2, gate_up, hidden = kept[:10]
        inputs = kernels.AttentionInputs(*kept[10:])
        dtype = inputs.qkv.dtype
        with torch.autocast("cpu", enabled=False):
            d_output = d_output.reshape(x.shape).contiguous()
            options = ctx.options
            d = dropped(d_output, dtype, options.of_mlp)
            d_down = d.T @ hidden
            d_gate_up = kernels.swiglu_backward(gate_up, d @ down)
            d_gate_up_weight = d_gate_up.T @ normed2
            d_normed2 = d_gate_up @ gate_up_weight
            dx2, d_norm2 = kernels.add_norm_backward(x2, norm2, inverse_rms2, d_normed2, d_output)
            d = dropped(dx2, dtype, options.of_attention)
            d_o = d.T @ y
            d_qkv, *d_others, d_first_values = kernels.attention_backward(
                inputs, options.eps, options.of_weights, log_sums, d @ o
            )
            d_qkv_weight = d_qkv.T @ normed
            d_normed = d_qkv @ qkv_weight
            dx, d_norm1 = kernels.add_norm_backward(x, norm1, inverse_rms, d_normed, dx2)
            matrices = (d_qkv_weight, d_o, d_gate_up_weight, d_down)
            d_qkv_weight, d_o, d_gate_up_weight, d_down = (d.to(dx.dtype) for d in matrices)
        d_matrices = *d_qkv_weight.split(ctx.rows), d_o, *d_gate_up_weight.chunk(2), d_down
        dx = dx.view(*inputs.starts.shape, -1)
        return dx, None, None, d_first_values, d_norm1, d_norm2, *d_matrices, *d_others


class NativeNorm(torch.autograd.Function):
    """RMSNorm of x (..., C), float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.size(-1)).contiguous()
        normed, inverse_rms = kernels.norm(rows, weight, eps, torch.float32)
        ctx.save_for_backward(rows, weight, inverse_rms)
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, inverse_rms = ctx.saved_tensors
        d_rows = d_normed.reshape(rows.shape).contiguous()
        nothing = torch.zeros_like(rows)
        dx, d_weight = kernels.add_norm_backward(rows, weight, inverse_rms, d_rows, nothing)
        return dx.view(d_normed.shape), d_weight, None


def native_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm(x); x and weight are float32, on a CPU."""
    output: Tensor = NativeNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return output


def trains_natively(weight: Tensor) -> bool:
    """Return whether training.c computes with a weight: float32 on a CPU, with gradients on."""
    on = torch.is_grad_enabled() and weight.dtype == torch.float32
    return on and kernels.available(weight.device, matmul_dtype(weight))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matmuls on a CPU: autocast's, or that of x."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def add_product(x: Tensor, a: Tensor, b: Tensor, dropout: Dropout) -> Tensor:
    """Return x + a @ b with dropout of the product, in the dtype of x."""
    if a.dtype == x.dtype and not dropout.kept_from:
        return torch.addmm(x, a, b)
    return x + kernels.drop_(a @ b, dropout)


def dropped(d: Tensor, dtype: torch.dtype, dropout: Dropout) -> Tensor:
    """Return the gradient by what was dropped out and added, in `dtype`, for that of the sum."""
    copy = d.clone() if dropout.kept_from and d.dtype == dtype else d.to(dtype)
    return kernels.drop_(copy, dropout)


def native_block(
    x: Tensor,
    documents: Documents,
    options: Options,
    first_values: Tensor | None,
    weights: list[Tensor | None],
) -> Tensor:
    """Return the output (B, T, C) of a block for x (B, T, C); see NativeBlock for the weights.

    first_values (B, K, T, D): the first block's values, or None.
    """
    if first_values is not None:
        first_values = first_values.transpose(1, 2).flatten(2).to(matmul_dtype(x)).contiguous()
    output: Tensor = NativeBlock.apply(  # type: ignore[no-untyped-call]
        x, documents, options, first_values, *weights
    )
    return output
