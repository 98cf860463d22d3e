"""The model against the Llama of transformers with the same weights."""

import pytest
import torch

from model import Transformer
from tests.support.models import random_model, reference_of
from tests.support.parity import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    assert_parity,
    assert_same_ten_steps,
    assert_was_compiled,
    reset_compiler,
)

heads = pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
tying = pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
thetas = pytest.mark.parametrize("rope_theta", [1e4, 1e6])


def compiled(model: Transformer) -> Transformer:
    """Return the model with `hidden` compiled; tests/training/test_compile.py has the loss."""
    reset_compiler()
    model.hidden = torch.compile(model.hidden, dynamic=False)
    return model


@heads
@tying
@thetas
def test_logits_loss_and_every_gradient_equal_transformers_in_float32(
    n_kv_heads: int, tie_embeddings: bool, rope_theta: float
) -> None:
    model = random_model(
        n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings, rope_theta=rope_theta
    )
    assert_parity(model, reference_of(model), FLOAT32)


@pytest.mark.usefixtures("float64")
@heads
@tying
@thetas
def test_logits_loss_and_every_gradient_equal_transformers_in_float64(
    n_kv_heads: int, tie_embeddings: bool, rope_theta: float
) -> None:
    model = random_model(
        n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings, rope_theta=rope_theta
    )
    assert_parity(model, reference_of(model), FLOAT64)


@heads
@tying
@thetas
def test_bfloat16_autocast_stays_within_its_eight_bits_of_transformers_in_float32(
    n_kv_heads: int, tie_embeddings: bool, rope_theta: float
) -> None:
    model = random_model(
        n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings, rope_theta=rope_theta
    )
    assert_parity(model, reference_of(model), BFLOAT16)


@heads
@tying
def test_ten_adamw_steps_follow_transformers_in_float32(
    n_kv_heads: int, tie_embeddings: bool
) -> None:
    model = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings)
    assert_same_ten_steps(model, reference_of(model), FLOAT32)


@pytest.mark.usefixtures("float64")
@heads
@tying
def test_ten_adamw_steps_follow_transformers_in_float64(
    n_kv_heads: int, tie_embeddings: bool
) -> None:
    model = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings)
    assert_same_ten_steps(model, reference_of(model), FLOAT64)


def test_ten_adamw_steps_under_bfloat16_autocast_follow_transformers_in_float32() -> None:
    model = random_model()
    assert_same_ten_steps(model, reference_of(model), BFLOAT16)


@pytest.mark.slow
def test_the_compiled_model_equals_transformers_in_float32_and_follows_its_ten_adamw_steps() -> (
    None
):
    """One graph, as each takes half a minute to compile.

    tests/training/test_compile.py has the graphs of training: grouped, document-masked, GPT-2's.
    """
    model = random_model(n_kv_heads=1, tie_embeddings=False, rope_theta=1e6)
    reference = reference_of(model)
    assert_parity(compiled(model), reference, FLOAT32)
    assert_same_ten_steps(model, reference, FLOAT32)
    assert_was_compiled()
