"""Filters against transformers' logits processors, and draws against the probabilities."""

import dataclasses
import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import ModelConfig, Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.inference import sampling
from pocketlm.inference.native import NativeBackend
from pocketlm.inference.sampling import (
    banned_ngram_tokens,
    filter_logits,
    log_probabilities,
    sample,
)

PLAIN = SamplingParams(temperature=1.0, top_p=1.0)
TRUNCATIONS = [
    dict(temperature=0.7), dict(temperature=3.0),
    dict(top_k=1), dict(top_k=5), dict(top_k=500),
    dict(top_p=0.3), dict(top_p=1e-6), dict(top_p=0.95),
    dict(min_p=0.2), dict(min_p=1.0),
]  # fmt: skip
PENALTIES = [
    dict(repetition_penalty=1.7), dict(repetition_penalty=0.6),
    dict(no_repeat_ngram=1), dict(no_repeat_ngram=2), dict(no_repeat_ngram=3),
    dict(no_repeat_ngram=40),
    dict(logit_bias=((3, 2.5), (99, -100.0))),
]  # fmt: skip
ALL_FILTERS = dict(
    temperature=1.4,
    top_k=20,
    top_p=0.7,
    min_p=0.05,
    repetition_penalty=1.3,
    no_repeat_ngram=2,
    logit_bias=((5, 3.0), (6, -1.0)),
)


def their_processors(params: SamplingParams):
    """Return Hugging Face's processors, in the order in which its `generate` calls them."""
    from transformers import generation as hf

    processors = []
    if params.logit_bias:
        biases = {(i,): bias for i, bias in params.logit_bias}
        processors.append(hf.SequenceBiasLogitsProcessor(biases))
    processors.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.no_repeat_ngram:
        processors.append(hf.NoRepeatNGramLogitsProcessor(params.no_repeat_ngram))
    processors.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(hf.MinPLogitsWarper(params.min_p))
    return hf.LogitsProcessorList(processors)


def random_logits(size: int = 100, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    """Return (16, size) logits, and contexts with repeated ids and repeated pairs.

    An id that is repeated is penalised once.
    """
    generator = torch.Generator().manual_seed(0)
    context = torch.randint(min(size, 100), (16, 30), generator=generator)
    context[:, -2:] = context[:, 3:5]
    return spread * torch.randn(16, size, generator=generator), context


@pytest.mark.parametrize("changes", [*TRUNCATIONS, *PENALTIES, ALL_FILTERS], ids=str)
def test_filtered_logits_equal_transformers(changes):
    params = dataclasses.replace(PLAIN, **changes)
    logits, context = random_logits()
    before = logits.clone()
    ours = filter_logits(logits, params, context.tolist())
    theirs = their_processors(params)(context, logits.clone())
    assert torch.equal(ours.isinf(), theirs.isinf())
    # The same float32 operations, with a difference of one rounding at most
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_a_nucleus_of_a_few_tokens_and_of_most_equals_transformers(spread):
    """With a spread of 0.5 the nucleus is most of the vocabulary, with 6 a few tokens."""
    params = dataclasses.replace(PLAIN, top_p=0.9)
    logits, context = random_logits(5000, spread)
    ours = filter_logits(logits, params, context.tolist())
    theirs = their_processors(params)(context, logits.clone())
    size = (~ours.isinf()).sum(-1)
    assert (size.min() > 256) == (spread < 6)
    # float32 sums of thousands of terms, begun at the other end
    assert ((~theirs.isinf()).sum(-1) - size).abs().max() <= 1
    common = int(size.min()) - 1
    assert torch.equal(ours.topk(common).indices, theirs.topk(common).indices)


def test_a_filter_keeps_the_most_likely_token_always():
    params = SamplingParams(temperature=1.0, top_k=1, top_p=1e-9, min_p=1.0)
    filtered = filter_logits(torch.tensor([[1.0, 5.0, 2.0]]), params, [[]])
    assert filtered.tolist() == [[-math.inf, 5.0, -math.inf]]


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_no_ngram_is_written_twice(context, n):
    ngrams = [tuple(context[i : i + n]) for i in range(len(context) - n + 1)]
    for token in range(4):
        new = tuple([*context, token][-n:])
        assert (token in banned_ngram_tokens(context, n)) == (len(new) == n and new in ngrams)


def test_greedy_takes_the_largest_and_the_first_of_equals_after_penalties():
    logits = torch.tensor([[0.0, 7.0, 7.0], [1.0, 0.0, -1.0]])
    draws = torch.rand(2)
    greedy = SamplingParams(temperature=0)
    assert sample(logits, greedy, [[], []], draws).tolist() == [1, 0]
    penalised = SamplingParams(temperature=0, no_repeat_ngram=1)
    assert sample(logits, penalised, [[1], [0]], draws).tolist() == [2, 1]


def test_drawn_tokens_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(20_000, 1)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    shares = sample(logits, PLAIN, [[]] * 20_000, draws).bincount(minlength=4) / 20_000
    # Five standard deviations of a share of a half
    torch.testing.assert_close(shares, logits[0].softmax(0), rtol=0, atol=0.018)


@pytest.mark.parametrize("draw, token", [
    (0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 3), (0.5999, 3), (0.6001, 4),
    (1 - 2**-53, 4),
])  # fmt: skip
def test_each_token_has_its_share_of_the_draws_in_order(draw, token):
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.3, 0.4]]).log()
    draws = torch.tensor([draw], dtype=torch.float64)
    assert sample(logits, PLAIN, [[]], draws).tolist() == [token]


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_what_a_filter_excludes_is_never_drawn(draw, seed):
    logits = 3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))
    params = SamplingParams(temperature=1.0, top_k=7, top_p=0.8, min_p=0.01)
    [token] = sample(logits, params, [[]], torch.tensor([draw], dtype=torch.float64)).tolist()
    assert not filter_logits(logits, params, [[]])[0, token].isinf()


def test_log_probabilities_are_those_of_the_softmax():
    logits, _ = random_logits()
    tokens = torch.arange(16)
    expected = logits.double().log_softmax(-1)
    for row, (chosen, top) in enumerate(log_probabilities(logits, tokens, 5)):
        assert chosen == pytest.approx(expected[row, row].item(), abs=1e-5)
        assert [i for i, _ in top] == expected[row].topk(5).indices.tolist()
        values = expected[row].topk(5).values.tolist()
        assert [logprob for _, logprob in top] == pytest.approx(values, abs=1e-5)
    assert log_probabilities(logits, tokens, 0)[0][1] == []


def test_the_worked_examples():
    assert doctest.testmod(sampling).failed == 0


BAD = [
    ("max_new_tokens", 0), ("max_new_tokens", -1), ("max_new_tokens", 10**12),
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
    ("top_k", -1),
    ("top_p", 0.0), ("top_p", 1.5), ("top_p", -0.5), ("top_p", math.nan),
    ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan),
    ("repetition_penalty", 0.0), ("repetition_penalty", -1.0),
    ("repetition_penalty", math.inf), ("repetition_penalty", math.nan),
    ("num_samples", 0), ("num_samples", 10**9),
    ("stop", ("a", "")), ("stop", ("x",) * 65), ("stop", ("x" * 1001,)),
    ("seed", -1), ("seed", 2**63),
    ("no_repeat_ngram", -1),
    ("logit_bias", ((-1, 0.0),)), ("logit_bias", ((1, math.nan),)),
    ("stop_ids", (-3,)),
]  # fmt: skip


@pytest.mark.parametrize("name, value", BAD, ids=lambda value: repr(value)[:30])
def test_a_bad_value_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is ") as refused:
        SamplingParams(**{name: value})
    assert len(str(refused.value)) < 250


# ---- in C ----

NATIVE_PARAMS = [PLAIN]
NATIVE_PARAMS += [dataclasses.replace(PLAIN, **changes) for changes in TRUNCATIONS]
NATIVE_PARAMS += [
    SamplingParams(temperature=1.4, top_k=20, top_p=0.7, min_p=0.05),
    SamplingParams(temperature=0.8, top_k=90, top_p=0.99),
]


def params_id(params: SamplingParams) -> str:
    return f"T={params.temperature} k={params.top_k} p={params.top_p} m={params.min_p}"


@pytest.fixture(scope="module")
def sample_in_c():
    config = ModelConfig(vocab_size=5, n_layers=1, d_model=16, n_heads=2, max_seq_len=4)
    return NativeBackend(Transformer(config)).sample


@pytest.mark.parametrize("spread", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("size", [1, 2, 100, 255, 256, 257, 5000])
@pytest.mark.parametrize("params", NATIVE_PARAMS, ids=params_id)
def test_the_draw_in_c_falls_into_the_share_of_the_same_token(sample_in_c, params, size, spread):
    """Some of the logits are -inf and some are equal."""
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(40, size, generator=generator)
    logits[:, size // 3 : size // 2] = logits[:, size // 3 : size // 3 + 1]
    logits[::2, size // 2 : size // 2 + size // 10] = -math.inf
    draws = torch.rand(40, dtype=torch.float64, generator=generator)
    shares = filter_logits(logits, params, [[]] * 40).double().softmax(-1)
    ends = shares.cumsum(-1)
    for row, token in enumerate(sample_in_c(logits, params, draws).tolist()):
        smallest = shares[row][shares[row] > 0].min().item()
        share, end = shares[row, token], ends[row, token]
        # A nucleus may end a token sooner or later, which is the least likely one in it
        if params.top_p < 1:
            assert share >= smallest * (1 - 1e-5) or logits[row, token] > -math.inf
        else:
            assert share >= smallest * (1 - 1e-5)
        # float32: 1e-5 of a share
        rounding = 1e-5 + (smallest if params.top_p < 1 else 0)
        assert end - share - rounding <= draws[row] <= end + rounding


def test_the_most_likely_tokens_in_c_are_as_many_as_requested(sample_in_c):
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0)).repeat(2000, 1)
    draws = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    for top_k in (1, 2, 7, 11, 12, 40):
        drawn = sample_in_c(logits, dataclasses.replace(PLAIN, top_k=top_k), draws)
        assert set(drawn.tolist()) == set(logits[0].topk(top_k).indices.tolist())
    for top_p in (1e-6, 0.01, 0.03):
        params = dataclasses.replace(PLAIN, top_p=top_p)
        drawn = sample_in_c(logits, params, draws)
        nucleus = filter_logits(logits[:1], params, [[]])[0] > -math.inf
        assert set(drawn.tolist()) == set(nucleus.nonzero()[:, 0].tolist())
