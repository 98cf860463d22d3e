"""Every legal setting: C and torch draw alike, and what excludes all tokens ends the text.

The settings go to the ends of their ranges and to the numbers that float32 does not have.
"""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import ModelConfig, Transformer
from pocketlm.config.sampling import (
    MAX_LOGIT_BIAS,
    MAX_NO_REPEAT_NGRAM,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MIN_REPETITION_PENALTY,
    SamplingParams,
)
from pocketlm.errors import FieldError
from pocketlm.inference.backend import TorchBackend
from pocketlm.inference.engine import Engine, GenerationRequest
from pocketlm.inference.native import NativeBackend
from pocketlm.inference.sampling import NO_TOKEN, apply_biases_and_penalties, filter_logits, sample
from tests.support.checkpoints import confident_model

PLAIN = SamplingParams(temperature=1.0, top_p=1.0)
N_EXAMPLES = 120
SIZES = (1, 2, 30, 300, 2000)  # of vocabularies

# The numbers at which float32 overflows, underflows or has no digit left
EDGES = [
    5e-324,
    1e-320,
    1e-46,
    1e-40,
    1.2e-38,
    1e-30,
    1e-10,
    1e-6,
    1 - 2**-53,
    1 - 1e-9,
    1e3,
    1e30,
    1e39,
    1e300,
]


def numbers(smallest: float, largest: float) -> st.SearchStrategy[float]:
    edges = [edge for edge in [smallest, *EDGES, largest] if smallest <= edge <= largest]
    return st.sampled_from(edges) | st.floats(smallest, largest)


@st.composite
def situations(draw) -> tuple[SamplingParams, Tensor, list[list[int]], Tensor]:
    """Return legal settings, logits (3, V), contexts, and draws."""
    size = draw(st.sampled_from(SIZES))
    tokens = st.integers(0, size - 1)
    biases = st.floats(-math.inf, MAX_LOGIT_BIAS, allow_nan=False) | st.just(-math.inf)
    params = SamplingParams(
        temperature=draw(numbers(5e-324, 1.7e308)),
        top_k=draw(st.integers(0, size)),
        top_p=draw(numbers(5e-324, 1)),
        min_p=draw(numbers(0, 1)),
        repetition_penalty=draw(numbers(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)),
        frequency_penalty=draw(numbers(-MAX_PENALTY, MAX_PENALTY)),
        presence_penalty=draw(numbers(-MAX_PENALTY, MAX_PENALTY)),
        no_repeat_ngram=draw(st.integers(0, 3) | st.just(MAX_NO_REPEAT_NGRAM)),
        logit_bias=tuple(draw(st.lists(st.tuples(tokens, biases), max_size=4))),
    )
    spread = draw(st.sampled_from([0, 1e-8, 0.3, 4, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = spread * torch.randn(3, size, generator=generator)
    contexts = draw(st.lists(st.lists(tokens, max_size=40), min_size=3, max_size=3))
    # Not at an end of [0, 1), where a share of 1e-38 decides, which C takes for none
    draws = torch.tensor([draw(st.floats(1e-6, 1 - 1e-6)) for _ in range(3)])
    return params, logits, contexts, draws.double()


@pytest.fixture(scope="module")
def sample_in_c():
    config = ModelConfig(vocab_size=5, n_layers=1, d_model=16, n_heads=2, max_seq_len=4)
    return NativeBackend(Transformer(config)).sample


def shares_of(logits: np.ndarray, params: SamplingParams, slack: float) -> np.ndarray:
    """Return the probabilities (V,) of penalised logits (V,), in float64 and by definition.

    A nucleus or a minimum that ends within `slack` may end sooner or later by a rounding: a
    positive slack keeps more tokens.
    """
    x = logits.astype(np.float64)
    if 0 < params.top_k < len(x):
        x = np.where(x >= np.sort(x)[-params.top_k], x, -np.inf)
    relative = np.where(
        x == x.max(), 0, (x - x.max()) / min(max(params.temperature, 1.2e-38), 1e30)
    )
    p = np.exp(relative)
    order = np.argsort(-relative, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    reached = before < min(1, params.top_p + slack) * p.sum()
    last = order[max(0, reached.sum() - 1)]
    nucleus = (relative >= relative[last]) | (slack > 0) & (p >= p[last] * (1 - slack))
    p = np.where(nucleus | (relative == 0), p, 0)
    p = np.where((p >= params.min_p * (1 - slack)) | (relative == 0), p, 0)
    return p / p.sum()


@settings(max_examples=N_EXAMPLES, deadline=None)
@given(situations())
def test_c_and_torch_draw_the_same_token_under_every_legal_setting(sample_in_c, situation):
    """Both draw from the distribution that float64 arithmetic defines; neither ever raises."""
    params, logits, contexts, draws = situation
    penalised = apply_biases_and_penalties(logits, params, contexts)
    drawn = [sample(logits, params, contexts, draws, sampler) for sampler in (sample_in_c, None)]
    for row, draw in enumerate(draws.tolist()):
        tokens = [int(each[row]) for each in drawn]
        values = penalised[row].numpy()
        assert not np.isnan(values).any()
        if values.max() == -math.inf:
            assert tokens == [NO_TOKEN, NO_TOKEN]
            continue
        possible = []
        # 2e-5: float32 sums of up to 2,000 probabilities
        for slack in (-2e-5, 0, 2e-5):
            shares = shares_of(values, params, slack)
            ends = shares.cumsum()
            inside = (ends - shares - 2e-5 <= draw) & (draw <= ends + 2e-5) & (shares > 0)
            possible += inside.nonzero()[0].tolist()
        assert set(tokens) <= set(possible), (tokens, values[tokens])


@settings(max_examples=40, deadline=None)
@given(situations())
def test_filtered_logits_keep_a_token_and_are_never_nan(situation):
    params, logits, contexts, _ = situation
    filtered = filter_logits(logits, params, contexts)
    assert not filtered.isnan().any()
    possible = apply_biases_and_penalties(logits, params, contexts).amax(-1) > -math.inf
    assert torch.equal(filtered.amax(-1) > -math.inf, possible)


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-46, 1e-40, 1e-38])
def test_a_temperature_near_0_takes_the_most_likely_token(sample_in_c, temperature):
    """Divided by it, logits are infinite in float32."""
    params = SamplingParams(temperature=temperature, top_p=1.0)
    logits = 5 * torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    draws = torch.linspace(0, 0.99, 50, dtype=torch.float64)
    for sampler in (sample_in_c, None):
        tokens = sample(logits, params, [[]] * 50, draws, sampler)
        assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("top_p", [5e-324, 1e-46, 1e-38])
def test_a_nucleus_is_never_empty(sample_in_c, top_p):
    """A share that float32 rounds to 0 once kept C searching for ever."""
    params = dataclasses.replace(PLAIN, top_p=top_p)
    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(0))
    draws = torch.linspace(0, 0.99, 20, dtype=torch.float64)
    for sampler in (sample_in_c, None):
        tokens = sample(logits, params, [[]] * 20, draws, sampler)
        assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("change", [dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0)], ids=str)
def test_a_high_temperature_does_not_make_different_logits_equal(sample_in_c, change):
    """Their probabilities are the same in float32; the most likely token is still one."""
    params = SamplingParams(**{"temperature": 1e308, "top_p": 1.0} | change)
    logits = torch.full((40, 300), 1.0)
    logits[:, 200] += 1e-6
    draws = torch.linspace(0, 0.99, 40, dtype=torch.float64)
    for sampler in (sample_in_c, None):
        assert set(sample(logits, params, [[]] * 40, draws, sampler).tolist()) == {200}


# ---- penalties ----


def test_frequency_and_presence_penalties_count_what_was_generated():
    """A worked example of OpenAI's formula: logit - count * frequency - (count > 0) * presence.

    The prompt's tokens, 3 and 0, do not count; those generated after it are 1, 1 and 2.
    """
    params = dataclasses.replace(PLAIN, frequency_penalty=0.5, presence_penalty=0.25)
    logits = torch.tensor([[1.0, 2.0, -3.0, 4.0]])
    penalised = apply_biases_and_penalties(logits, params, [[3, 0, 1, 1, 2]], [3])
    assert penalised.tolist() == [[1.0, 2.0 - 2 * 0.5 - 0.25, -3.0 - 0.5 - 0.25, 4.0]]


@pytest.mark.parametrize("backend", [NativeBackend, TorchBackend])
def test_the_engine_penalises_generated_tokens_only(backend):
    """The reference is a loop over the model's own logits."""
    model = confident_model()
    prompt = [5, 9, 5, 7]
    params = SamplingParams(
        temperature=0, max_new_tokens=25, frequency_penalty=2.0, presence_penalty=1.5
    )
    engine = Engine(model, 1, backend=backend(model))
    engine.add(GenerationRequest(prompt, params))
    found = []
    while engine.busy:
        found += [token.id for token in engine.step()]
    ids = list(prompt)
    for _ in range(25):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        for token, n in Counter(ids[len(prompt) :]).items():
            logits[token] -= 2.0 * n + 1.5
        ids.append(int(logits.argmax()))
    assert found == ids[len(prompt) :]
    assert len(set(found)) > 10


# ---- nothing may follow ----


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("backend", [NativeBackend, TorchBackend])
def test_a_text_ends_when_every_token_is_excluded(backend, temperature):
    """With no_repeat_ngram=1 a vocabulary of 5 is used up after 5 tokens; others go on."""
    model = confident_model(vocab_size=5)
    engine = Engine(model, 2, backend=backend(model))
    params = SamplingParams(temperature=temperature, top_p=1.0, max_new_tokens=20, seed=1)
    unique = GenerationRequest([2], dataclasses.replace(params, no_repeat_ngram=1), top_logprobs=2)
    other = GenerationRequest([2], params)
    engine.add(unique)
    engine.add(other)
    tokens = []
    while engine.busy:
        tokens += engine.step()
    mine = [token for token in tokens if token.request is unique]
    assert sorted([2, *(token.id for token in mine[:-1])]) == [0, 1, 2, 3, 4]
    assert (mine[-1].id, mine[-1].end, mine[-1].logprob) == (NO_TOKEN, "stop", None)
    assert sum(token.request is other for token in tokens) == 20


# ---- limits ----


@pytest.mark.parametrize(
    "name, value, limits",
    [
        ("repetition_penalty", 1e-30, "from 0.01 to 100"),
        ("repetition_penalty", 1e30, "from 0.01 to 100"),
        ("frequency_penalty", 2.1, "from -2 to 2"),
        ("presence_penalty", -2.1, "from -2 to 2"),
        ("presence_penalty", math.nan, "from -2 to 2"),
        ("no_repeat_ngram", 10**9, "from 0 to 100"),
        ("logit_bias", ((1, 1e7),), "a number of at most 1,000,000"),
        ("logit_bias", ((1, math.inf),), "a number of at most 1,000,000"),
    ],
)
def test_a_number_beyond_its_limit_is_refused_with_the_limit(name, value, limits):
    with pytest.raises(FieldError, match=f"^{name} is .*{limits}$"):
        SamplingParams(**{name: value})
