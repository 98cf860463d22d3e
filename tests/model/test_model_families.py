"""The relatives of Llama against transformers' classes with the same weights."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model import KVCache
from pocketlm.errors import FieldError
from pocketlm.model.loss import batch_loss
from pocketlm.model.rope import RopeScaling, rope_tables
from tests.support.families import (
    CONTEXT,
    FAMILIES,
    SIZES,
    our_config,
    scaled,
    their_config,
    their_model,
)
from tests.support.losses import assert_gradients_near, next_token_batch, next_token_loss
from tests.support.models import gradients, random_ids, random_model, relative_error
from tests.support.parity import FLOAT32

families = pytest.mark.parametrize("name", FAMILIES)
ROWS = random_ids(length=CONTEXT, vocab_size=SIZES["vocab_size"])


@families
def test_logits_loss_and_every_gradient_equal_transformers(name: str) -> None:
    """At lengths up to four times the context of pretraining, where RoPE is scaled."""
    family = FAMILIES[name]
    ours = random_model(**SIZES | family.ours)
    theirs = their_model(family, ours)
    expected = theirs(ROWS).logits
    with torch.no_grad():  # with gradients, the logits are training.c's where it computes the model
        assert relative_error(ours(ROWS), expected) < FLOAT32.logits
    loss = batch_loss(ours, next_token_batch(ROWS), chunk=0) / ROWS[:, 1:].numel()
    expected_loss = next_token_loss(expected, ROWS)
    loss.backward()
    expected_loss.backward()
    assert relative_error(loss, expected_loss) < FLOAT32.loss
    assert_gradients_near(gradients(ours), gradients(theirs), FLOAT32.gradients)


@families
@torch.no_grad()
def test_a_cache_and_a_row_alone_change_no_logit(name: str) -> None:
    """But for the order of float32 sums."""
    model = random_model(**SIZES | FAMILIES[name].ours)
    expected = model(ROWS)
    cache = KVCache(model.config, 2, CONTEXT, dtype=torch.float32, device=model.device)
    parts = [model(part, cache=cache) for part in ROWS.split([20, 1, 27], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)
    alone = torch.cat([model(row[None]) for row in ROWS])
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)


@families
def test_n_parameters_is_the_count_of_transformers(name: str) -> None:
    theirs = their_model(FAMILIES[name], random_model(**SIZES | FAMILIES[name].ours))
    assert our_config(FAMILIES[name]).n_parameters == theirs.num_parameters()


LONG = 4096
SCALINGS = {
    "llama3": dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": dict(factor=40.0),
    "yarn of a shorter context": dict(factor=0.5),
    "yarn with one pair in the range": dict(factor=4.0, beta_fast=1.01, beta_slow=1.0),
    "linear": dict(factor=2.5),
}


@pytest.mark.parametrize("head_dim", [2, 64])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rotary_tables_equal_transformers(name: str, head_dim: int) -> None:
    family = scaled(name.split()[0], SCALINGS[name], **SCALINGS[name])
    config = their_config(family)
    config.head_dim = head_dim
    expected = LlamaRotaryEmbedding(config)(torch.zeros(()), torch.arange(LONG)[None])
    tables = rope_tables(head_dim, LONG, 500.0, family.ours["rope_scaling"])
    for ours, theirs in zip(tables, expected, strict=True):
        # one rounding, 6e-8, of a frequency, times the largest position
        torch.testing.assert_close(ours, theirs[0], rtol=0, atol=3e-4)


INVALID = [
    (dict(kind="yarn", factor=0.0), "factor is 0.0;"),
    (dict(kind="yarn", factor=float("inf")), "factor is inf;"),
    (dict(kind="linear", factor=2.0, original_max_seq_len=8), "original_max_seq_len is 8; linear"),
    (dict(kind="llama3", factor=2.0, truncate=False), "truncate is False; llama3 does not read it"),
    (dict(kind="llama3", factor=2.0), "original_max_seq_len is None; llama3 needs"),
    (dict(kind="yarn", factor=2.0, original_max_seq_len=0), "original_max_seq_len is 0;"),
    (
        dict(kind="llama3", factor=2.0, original_max_seq_len=8, low_freq_factor=4.0),
        "low_freq_factor is 4.0; it must be below high_freq_factor 4.0",
    ),
    (
        dict(kind="yarn", factor=2.0, original_max_seq_len=8, beta_slow=40.0),
        "beta_slow is 40.0; it must be below beta_fast 32.0",
    ),
    (
        dict(kind="yarn", factor=2.0, original_max_seq_len=8, attention_factor=-1.0),
        "attention_factor is -1.0;",
    ),
]


@pytest.mark.parametrize("values, message", INVALID, ids=str)
def test_a_scaling_that_cannot_be_is_refused_by_name_and_value(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(FieldError, match=message):
        RopeScaling(**values)
