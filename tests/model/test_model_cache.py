"""The KV cache, and on which tokens a logit depends."""

import pytest
import torch

from model import KVCache, Transformer, positions_in_document
from tests.support.models import MIXED, PACKED, TINY, T, random_ids, random_model

heads = pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
CHUNKS = {"whole": [T], "chunks": [5, 4, 4], "uneven": [6, 1, 6], "tokens": [1] * T}


def new_cache(model: Transformer, batch_size: int, max_len: int = T) -> KVCache:
    device = torch.device("cpu")
    return KVCache(model.config, batch_size, max_len, dtype=torch.float32, device=device)


def other_tokens(ids: torch.Tensor) -> torch.Tensor:
    return (ids + 1) % TINY["vocab_size"]


# ---- the cache ----


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@heads
@torch.no_grad()
def test_cached_logits_equal_the_full_forward_pass(chunks: list[int], n_kv_heads: int) -> None:
    """For a single key/value head with what mixes tokens and blocks; the cache has mixed values."""
    model = random_model(n_kv_heads=n_kv_heads, **MIXED if n_kv_heads == 1 else {}).eval()
    ids = random_ids(batch=3)
    cache = new_cache(model, batch_size=3)
    pieces, lengths = [], []
    for piece in ids.split(chunks, dim=1):
        pieces.append(model(piece, cache=cache))
        lengths.append(cache.length)
    assert lengths == torch.tensor(chunks).cumsum(0).tolist()
    assert (torch.cat(pieces, dim=1) - model(ids)).abs().max() < 1e-5  # float32 in another order


@torch.no_grad()
def test_a_cache_longer_than_needed_changes_nothing() -> None:
    model, ids = random_model(max_seq_len=4 * T).eval(), random_ids()
    long, exact = new_cache(model, 2, max_len=4 * T), new_cache(model, 2)
    assert (long.max_len, exact.max_len) == (4 * T, T)
    for piece in ids.split(4, dim=1):
        assert torch.equal(model(piece, cache=long), model(piece, cache=exact))


@torch.no_grad()
def test_more_tokens_than_the_context_are_refused_with_both_numbers() -> None:
    model, ids = random_model().eval(), random_ids(length=T + 1)
    with pytest.raises(ValueError, match=f"{T + 1} tokens .* {T}"):
        model(ids)
    cache = new_cache(model, 2)
    model(ids[:, :T], cache=cache)
    with pytest.raises(ValueError, match=f"{T + 1} tokens .* {T}"):
        model(ids[:, T:], cache=cache)
    assert cache.length == T


# ---- dependence on other tokens ----


@pytest.mark.parametrize("t", [0, 1, 6, T - 1])
@torch.no_grad()
def test_changing_a_token_changes_no_logit_before_it(t: int) -> None:
    """And it changes every logit from there on."""
    model, ids = random_model().eval(), random_ids()
    changed = ids.clone()
    changed[:, t] = other_tokens(ids[:, t])
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).flatten(2).any(-1).all()


@torch.no_grad()
def test_changing_a_row_of_the_batch_changes_no_other_row() -> None:
    model, ids = random_model().eval(), random_ids(batch=3)
    changed = ids.clone()
    changed[1] = other_tokens(ids[1])
    before, after = model(ids), model(changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("document", [4, 9, 2])
@torch.no_grad()
def test_changing_a_document_changes_no_logit_of_another(document: int) -> None:
    model, ids = random_model(**MIXED).eval(), random_ids()
    inside = document == PACKED
    changed = torch.where(inside, other_tokens(ids), ids)
    in_row = torch.arange(T).expand(2, T)
    for positions in (None, in_row):
        before, after = (model(x, doc_ids=PACKED, positions=positions) for x in (ids, changed))
        assert torch.equal(before[~inside], after[~inside])
        assert (before[inside] != after[inside]).any(-1).all()


@heads
@torch.no_grad()
def test_a_packed_document_has_the_logits_of_the_document_alone(n_kv_heads: int) -> None:
    model = random_model(n_kv_heads=n_kv_heads, **MIXED if n_kv_heads == 1 else {}).eval()
    ids = random_ids()
    packed = model(ids, doc_ids=PACKED)
    for row, document in [(0, 4), (0, 9), (0, 2), (1, 0), (1, 1)]:
        inside = PACKED[row] == document
        alone = model(ids[row, inside][None])[0]
        assert (packed[row, inside] - alone).abs().max() < 1e-5  # float32 in another order


@torch.no_grad()
def test_positions_of_packed_documents_are_by_default_those_in_the_document() -> None:
    """RoPE depends on distances only, so the logits differ by rounding alone: compare bits."""
    model, ids = random_model().eval(), random_ids()
    default = model(ids, doc_ids=PACKED)
    in_document = positions_in_document(PACKED)
    in_row = torch.arange(T).expand(2, T)
    assert torch.equal(default, model(ids, doc_ids=PACKED, positions=in_document))
    assert not torch.equal(default, model(ids, doc_ids=PACKED, positions=in_row))
