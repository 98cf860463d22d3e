"""Rules that the sizes of a Transformer obey; `ModelConfig` in model.py applies them."""

import math

from pocketlm.errors import FieldError


def default_d_ff(d_model: int, mlp: str) -> int:
    """Return the width inside the MLP when none is configured.

    Three matrices of SwiGLU at 8/3 d_model have as many weights as two matrices at 4 d_model.

    >>> default_d_ff(128, "swiglu"), default_d_ff(128, "gelu")
    (384, 512)
    """
    if mlp == "swiglu":
        return 64 * math.ceil(d_model * 8 / 3 / 64)
    return 4 * d_model


def check_heads(d_model: int, n_heads: int, n_kv_heads: int, *, rope: bool) -> None:
    """Raise FieldError if the widths cannot be divided into heads."""
    if d_model % n_heads:
        suggestion = d_model // n_heads * n_heads or n_heads
        raise FieldError(
            "d_model",
            f"{d_model} is not divisible by n_heads {n_heads}; "
            f"take d_model {suggestion} or another n_heads",
        )
    if n_heads % n_kv_heads:
        divisors = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
        raise FieldError(
            "n_heads",
            f"{n_heads} is not divisible by n_kv_heads {n_kv_heads}; take one of {divisors}",
        )
    head_dim = d_model // n_heads
    if rope and head_dim % 2:
        raise FieldError(
            "d_model", f"/ n_heads is {head_dim}; RoPE rotates pairs and needs an even number"
        )
