"""Small models with each kind of weights that decode.c multiplies."""

import copy

import torch
from torch import Tensor

from model import Transformer
from pocketlm.model.quantization import quantize
from tests.support.checkpoints import confident_model

KINDS = ("float32", "bfloat16", "int8", "int4")
SHAPES = {
    "vectors": dict(d_model=192, d_ff=320, n_heads=6),
    "odd widths": dict(d_model=36, d_ff=50, n_heads=6, n_kv_heads=1, vocab_size=67),
    "biases": dict(d_model=64, d_ff=100, n_heads=4, mlp="gelu", norm="layernorm", bias=True),
}

# Relative to the standard deviation of the logits. float32: sums of some 100 terms in another
# order. bfloat16: some ten roundings by 2^-9 of a value, which add up. Integers: activations have
# 16 bits, 2^-16 of the largest of a row.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.05, "int8": 1e-3, "int4": 1e-3}


def model_with(kind: str, **sizes) -> Transformer:
    """Return a model whose matrices are of this kind."""
    model = confident_model(**sizes)
    if kind == "bfloat16":
        return model.bfloat16()
    return model if kind == "float32" else quantize(model, kind)


def kinds_and_shapes() -> list[tuple[str, str]]:
    """Return the pairs of kinds and names of shapes; int4 needs a width that 64 divides."""
    pairs = [(kind, shape) for kind in KINDS for shape in SHAPES]
    return [pair for pair in pairs if pair != ("int4", "odd widths")]


@torch.inference_mode()
def exact_logits(model: Transformer, ids: Tensor) -> Tensor:
    """Return the logits (B, T, V) in float32 of a model without a cache, with the same weights."""
    return copy.deepcopy(model).float()(ids)


def relative_error(logits: Tensor, expected: Tensor) -> float:
    return ((logits - expected).square().mean().sqrt() / expected.std()).item()
