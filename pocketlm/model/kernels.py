"""The functions of training.c for contiguous CPU tensors; float32 where no dtype is named."""

import sys
from ctypes import Structure, byref, c_double, c_float, c_int, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocketlm.native_build import NativeUnavailable, load_native

SOURCE = Path(__file__).with_name("training.c")
C_TYPES = {bool: c_int, int: c_int64, float: c_float, type(None): c_void_p}
NORM_ROWS = 64  # as in training.c


@cache
def load() -> Any:
    """Return training.c as a library, or None; then print why."""
    try:
        return load_native(SOURCE)
    except NativeUnavailable as reason:
        print(f"note: training with torch alone, which is slower: {reason}", file=sys.stderr)
        return None


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether training.c computes with tensors of this device and dtype.

    It does not while torch.compile traces: the compiler fuses torch's own operations.
    """
    if torch.compiler.is_compiling() or device.type != "cpu":
        return False
    return dtype in (torch.float32, torch.bfloat16) and load() is not None


def call(name: str, *arguments: Any) -> None:
    """Call a function of training.c; its last parameter is the number of threads."""
    getattr(load(), name)(*map(as_c, arguments), c_int(torch.get_num_threads()))


def as_c(value: Any) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return c_void_p(value.data_ptr())
    if isinstance(value, Structure):
        return byref(value)
    return C_TYPES[type(value)](value)


def cross_entropy_(logits: Tensor, vocab_size: int, targets: Tensor) -> Tensor:
    """Replace logits (N, V or more) by the gradient of their summed loss; return the losses (N).

    A target below 0 has no loss. Logits after the V-th get the gradient 0.
    """
    if (largest := int(targets.max())) >= vocab_size:
        raise IndexError(f"target {largest} is out of bounds for {vocab_size} logits")
    losses = torch.empty(len(logits), dtype=torch.float32)
    N, stride = logits.shape
    half = logits.dtype == torch.bfloat16
    call("cross_entropy", N, vocab_size, stride, half, logits, targets.long(), losses)
    return losses


def norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return RMSNorm(x) (N, C) in `dtype` and 1 / rms of each row of x."""
    return add_norm(x, None, weight, eps, dtype)[1:]


def add_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + added (N, C), its RMSNorm in `dtype`, and 1 / rms of each of its rows (N)."""
    total = x if added is None else torch.empty_like(x)
    normed, inverse_rms = torch.empty_like(x, dtype=dtype), x.new_empty(len(x))
    half = dtype == torch.bfloat16
    call("add_norm", *x.shape, half, x, added, total, weight, normed, inverse_rms, eps)
    return total, normed, inverse_rms


def add_norm_backward(
    x: Tensor, weight: Tensor, inverse_rms: Tensor, d_normed: Tensor, d_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and by weight; d_sum is the gradient that passes the norm by."""
    N, C = x.shape
    dx, d_weight = torch.empty_like(x), x.new_empty(-(-N // NORM_ROWS), C)
    half = d_normed.dtype == torch.bfloat16
    call("add_norm_backward", N, C, half, x, weight, inverse_rms, d_normed, d_sum, dx, d_weight)
    return dx, d_weight.sum(0)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up (N, F), of gate_up (N, 2 F)."""
    N, F = len(gate_up), gate_up.size(1) // 2
    hidden = gate_up.new_empty(N, F)
    call("swiglu", N, F, gate_up.dtype == torch.bfloat16, gate_up, hidden)
    return hidden


def swiglu_backward(gate_up: Tensor, d_hidden: Tensor) -> Tensor:
    (N, F), d_gate_up = d_hidden.shape, torch.empty_like(gate_up)
    half = gate_up.dtype == torch.bfloat16
    call("swiglu_backward", N, F, half, gate_up, d_hidden, d_gate_up)
    return d_gate_up


class Dropout(Structure):
    """`struct dropout` of training.c: elements are dropped with a probability below 1.

    Which ones depends on the seed and on their place only.
    """

    _fields_ = [("seed", c_uint32), ("kept_from", c_uint32), ("factor", c_float)]

    def __init__(self, probability: float = 0.0, seed: int = 0):
        super().__init__(seed, int(probability * 2**32), 1 / (1 - probability))


def drop_(x: Tensor, dropout: Dropout) -> Tensor:
    """Drop elements of x (N, C) in place, and return it."""
    if dropout.kept_from:
        call("drop", *x.shape, x.dtype == torch.bfloat16, x, dropout)
    return x


class AttentionArguments(Structure):
    """`struct attention` of training.c."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "H", "K", "D", "half")),
        *((name, c_void_p) for name in ("qkv", "cos", "sin", "starts", "q_norm", "k_norm")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("value_mix", "first_values")),
        ("dropout", Dropout),
        *((name, c_void_p) for name in ("log_sums", "y", "dy")),
        *((name, c_void_p) for name in ("d_qkv", "d_norms", "d_value_mix", "d_first_values")),
    ]


class AttentionInputs(NamedTuple):
    """Causal attention within documents, of queries and keys which RoPE has not rotated yet.

    qkv (B T, (H + 2 K) D): queries, keys and values. cos, sin (positions, D): RoPE's tables. starts
    (B, T): index of the first token of each token's document. q_norm, k_norm (D): weights of
    QK-norm, or None. value_mix (2): factors of the values and of first_values (B T, K D), or None.
    """

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    starts: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    value_mix: Tensor | None = None
    first_values: Tensor | None = None

    def n_kv_heads(self, n_heads: int) -> int:
        return (self.qkv.size(1) // self.cos.size(1) - n_heads) // 2


def attention(
    inputs: AttentionInputs, n_heads: int, eps: float, dropout: Dropout
) -> tuple[Tensor, Tensor]:
    """Return attention (B T, H D), and what its gradient needs (B, H, T); eps: of QK-norm."""
    B, T = inputs.starts.shape
    y = inputs.qkv.new_empty(B * T, n_heads * inputs.cos.size(1))
    log_sums = inputs.cos.new_empty(B, n_heads, T)
    call_attention(inputs, n_heads, eps, dropout, log_sums=log_sums, y=y)
    return y, log_sums


def attention_backward(
    inputs: AttentionInputs, eps: float, dropout: Dropout, log_sums: Tensor, dy: Tensor
) -> tuple[Any, ...]:
    """Return the gradients by qkv, q_norm, k_norm, value_mix and first_values."""
    B, n_heads, _ = log_sums.shape
    n_kv_heads, D = inputs.n_kv_heads(n_heads), inputs.cos.size(1)
    *options, first_values = inputs[4:]
    outputs = {
        "d_qkv": torch.empty_like(inputs.qkv),
        "d_norms": dy.new_zeros(B * n_kv_heads, 2, D, dtype=torch.float32),
        "d_value_mix": dy.new_zeros(B * n_kv_heads, 2, dtype=torch.float32),
    }
    if first_values is not None:
        outputs["d_first_values"] = torch.empty_like(first_values)
    call_attention(inputs, n_heads, eps, dropout, log_sums=log_sums, dy=dy, **outputs)
    d_q_norm, d_k_norm = outputs["d_norms"].sum(0)
    gradients = d_q_norm, d_k_norm, outputs["d_value_mix"].sum(0)
    given = (None if option is None else d for option, d in zip(options, gradients, strict=True))
    return outputs["d_qkv"], *given, outputs.get("d_first_values")


def call_attention(
    inputs: AttentionInputs, n_heads: int, eps: float, dropout: Dropout, **others: Tensor
) -> None:
    """Call `attention` of training.c: forward with y, or backward with dy and d_qkv."""
    tensors = inputs._asdict() | others
    pointers = {name: x.data_ptr() for name, x in tensors.items() if x is not None}
    assert all(x is None or x.is_contiguous() for x in tensors.values())
    sizes = *inputs.starts.shape, n_heads, inputs.n_kv_heads(n_heads), inputs.cos.size(1)
    half = inputs.qkv.dtype == torch.bfloat16
    arguments = AttentionArguments(*sizes, half, eps=eps, dropout=dropout, **pointers)
    call("attention", arguments, "d_qkv" in others)
