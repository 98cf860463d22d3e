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


def check_heads(
    d_model: int, n_heads: int, n_kv_heads: int, head_dim: int | None, *, rope: bool
) -> int:
    """Return the width of a head. Raises FieldError if the widths cannot be divided into heads."""
    if head_dim is None and d_model % n_heads:
        suggestion = d_model // n_heads * n_heads or n_heads
        raise FieldError(
            "d_model",
            f"{d_model} is not divisible by n_heads {n_heads}; "
            f"take d_model {suggestion} or another n_heads, or set head_dim",
        )
    if n_heads % n_kv_heads:
        divisors = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
        raise FieldError(
            "n_heads",
            f"{n_heads} is not divisible by n_kv_heads {n_kv_heads}; take one of {divisors}",
        )
    field, is_it = ("d_model", "/ n_heads is") if head_dim is None else ("head_dim", "is")
    width = head_dim or d_model // n_heads
    if rope and width % 2:
        raise FieldError(field, f"{is_it} {width}; RoPE rotates pairs and needs an even number")
    return width
