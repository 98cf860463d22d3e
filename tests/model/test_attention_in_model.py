"""Tiled attention in a whole model: when training uses it, and that it changes no result."""

import pytest
import torch

from model import KVCache, ModelConfig, Transformer
from pocketlm.model import attention
from tests.support.gpt2 import gpt2_pair
from tests.support.losses import (
    assert_equal,
    assert_loss_equals_gpt2,
    assert_same_losses,
    compute,
    documents,
    gradient_errors,
    loss_function,
    make_batches,
    ten_clipped_losses,
)
from tests.support.models import random_ids, random_model, reference_of, relative_error
from tests.support.parity import BFLOAT16, FLOAT64, assert_parity, assert_same_ten_steps


@pytest.mark.usefixtures("torch_alone")
def test_training_under_bfloat16_autocast_uses_it_in_every_layer_and_validation_does_not(
    attention_kernels: list[str],
) -> None:
    model = Transformer(ModelConfig(vocab_size=61, max_seq_len=13, n_layers=2, d_model=32))
    ids = torch.arange(26).view(2, 13)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
        assert attention_kernels == ["tiled", "tiled"]
        with torch.no_grad():
            model(ids)
    assert attention_kernels == ["tiled", "tiled", "torch", "torch"]
    model(ids)  # in float32
    assert attention_kernels[4:] == ["torch", "torch"]


def test_a_bfloat16_model_reads_through_its_cache_with_gradients_on() -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=61, max_seq_len=13, n_layers=2, d_model=32, init_std=0.2)
    model = Transformer(config).bfloat16().eval()
    ids = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config, 2, 13, dtype=torch.bfloat16, device=torch.device("cpu"))
    pieces = torch.cat([model(piece, cache=cache) for piece in ids.split([7, 5, 1], dim=1)], dim=1)
    with torch.no_grad():
        expected = model(ids)
    # two computations of two layers, each with some 100 roundings of 0.0011 on average: 0.011, as
    # for BFLOAT16 in tests/support/parity.py
    assert (pieces.float() - expected.float()).norm() < 0.03 * expected.float().norm()


@documents
@pytest.mark.parametrize("chunk", [0, 7, 1000])
@pytest.mark.usefixtures("torch_alone")
def test_under_bfloat16_autocast_gradients_and_ten_steps_are_those_of_float32_within_its_rounding(
    monkeypatch: pytest.MonkeyPatch, packed: bool, chunk: int
) -> None:
    """Rows of 40 tokens, in tiles of 16."""
    monkeypatch.setattr(attention, "TILE", 16)
    batches = make_batches(2, packed, length=40)
    model = random_model(max_seq_len=40)
    loss_of = loss_function(model, chunk)
    expected = compute(model, loss_of, batches)
    result = compute(model, loss_of, batches, bfloat16=True)
    assert relative_error(result.loss, expected.loss) < BFLOAT16.loss
    errors = gradient_errors(result, expected)
    assert 1e-4 < max(errors.values()) < BFLOAT16.gradients, errors  # autocast did something
    losses = []
    for bfloat16 in (True, False):
        model = random_model(max_seq_len=40)
        losses.append(ten_clipped_losses(model, loss_function(model, chunk), batches, bfloat16))
    assert_same_losses(*losses, BFLOAT16.ten_losses)


@documents
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.usefixtures("float64")
def test_a_model_of_tiled_attention_has_the_loss_and_gradients_of_torchs(
    request: pytest.FixtureRequest, packed: bool, n_kv_heads: int
) -> None:
    batches = make_batches(2, packed)
    model = random_model(n_kv_heads=n_kv_heads)
    expected = compute(model, loss_function(model, 7), batches)
    expected_losses = ten_clipped_losses(model, loss_function(model, 7), batches)
    request.getfixturevalue("forced_tiles")
    model = random_model(n_kv_heads=n_kv_heads)
    assert_equal(compute(model, loss_function(model, 7), batches), expected)
    losses = ten_clipped_losses(model, loss_function(model, 7), batches)
    assert_same_losses(losses, expected_losses, 1e-9)


@pytest.mark.usefixtures("float64", "forced_tiles")
def test_recomputed_blocks_of_tiled_attention_have_the_same_gradients() -> None:
    results = []
    for recompute in (False, True):
        model = random_model(gradient_checkpointing=recompute).train()
        results.append(compute(model, loss_function(model, 7), make_batches(2, packed=True)))
    assert_equal(*results, tolerance=0)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.usefixtures("float64", "forced_tiles")
def test_in_float64_tiled_attention_gives_the_logits_gradients_and_ten_steps_of_transformers_llama(
    n_kv_heads: int,
) -> None:
    model = random_model(n_kv_heads=n_kv_heads)
    assert_parity(model, reference_of(model), FLOAT64)
    model = random_model(n_kv_heads=n_kv_heads)
    assert_same_ten_steps(model, reference_of(model), FLOAT64)


@pytest.mark.usefixtures("float64", "forced_tiles")
def test_in_float64_tiled_attention_gives_the_logits_and_gradients_of_transformers_gpt2() -> None:
    ours, theirs = gpt2_pair(2, 4)
    assert relative_error(ours(random_ids()), theirs(random_ids()).logits) < FLOAT64.logits
    assert_loss_equals_gpt2(ours, theirs, loss_function(ours, 7), FLOAT64)
