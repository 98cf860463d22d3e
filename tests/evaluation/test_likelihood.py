"""Log-probabilities equal those of transformers, of a plain loop, and of bigram models by hand."""

import math
import random

import pytest
import torch

from model import Transformer
from pocketlm.evaluation import likelihood
from pocketlm.evaluation.cases import Case
from pocketlm.evaluation.likelihood import Likelihood, Query, query_likelihoods
from pocketlm.evaluation.scoring import Score
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.bigrams import bigram_model, bigram_table
from tests.support.gpt2 import gpt2_pair
from tests.support.models import MIXED, reference_of
from tests.support.probes import NO_PREFIX, ROUNDING, logprobs_of, make_model, scores_of

CASES = [
    Case(
        "choice",
        "choice",
        prompt="one two",
        answers=(" three",),
        distractors=(" four", " seventeen"),
    ),
    Case("cloze", "cloze", prompt="x", answers=(" y",)),
    Case(
        "many",
        "choice",
        prompt="the longest prompt of them all",
        answers=(" ends", " stops"),
        distractors=(" goes on",),
    ),
    Case("pair", "minimal_pair", good="The dogs bark.", bad="The dogs barks."),
    Case(
        "schema",
        "schema",
        contexts=("It rains, so", "It shines and shines, so"),
        continuation=" we swim.",
        gold=1,
    ),
    Case("joined", "cloze", prompt="ab", answers=("c",), distractors=("d",)),
]


@pytest.fixture(scope="module")
def scored() -> tuple[Transformer, list[Score]]:
    """A model and its scores of CASES."""
    model = make_model()
    return model, scores_of(model, ByteTokenizer(), CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.id for case in CASES])
def test_scores_equal_the_loss_sums_of_transformers_llama(scored, index):
    """Its mean loss, with labels on the continuation alone, times the continuation's tokens."""
    model, scores = scored
    case, score = CASES[index], scores[index]
    llama = reference_of(model).eval()
    sums = []
    for context, continuation in case.candidates:
        ids = [256, *(context + continuation).encode()]
        n = len(continuation.encode())
        labels = [-100] * (len(ids) - n) + ids[-n:]
        with torch.no_grad():
            out = llama(torch.tensor([ids]), labels=torch.tensor([labels]))
        sums.append(-out.loss.item() * n)
        if len(sums) == 1:
            first_token_logprobs = out.logits[0, len(ids) - n - 1].log_softmax(-1)
            first_token = ids[-n]
    right = torch.tensor(sums[: case.n_right]).logsumexp(0).item()
    assert score.logprob == pytest.approx(right, abs=1e-4)  # a mean in float32, multiplied back
    if len(sums) > case.n_right:
        margin = max(sums[: case.n_right]) - max(sums[case.n_right :])
        assert score.margin == pytest.approx(margin, abs=1e-4)
        assert score.correct == float(sums.index(max(sums)) < case.n_right)
    if case.type == "minimal_pair":  # there is no prompt for a first token
        assert (score.top, score.first_token_rank, score.greedy) == ((), None, None)
        return
    p = first_token_logprobs.max().exp().item()
    assert score.top[0][1] == pytest.approx(p, rel=1e-4)  # float32, another softmax
    if case.n_right == 1:
        order = first_token_logprobs.argsort(descending=True).tolist()
        assert score.first_token_rank == order.index(first_token) + 1


# ---- queries ----


def random_queries(vocab_size: int, n: int = 60) -> list[Query]:
    """Return continuations of 1 to 6 tokens after contexts of 1 to 12, of which many are shared."""
    rng = random.Random(0)

    def random_ids(max_length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(rng.randint(1, max_length)))

    contexts = [random_ids(12) for _ in range(n // 4)]
    return [Query(rng.choice(contexts), random_ids(6)) for _ in range(n)]


def test_log_probabilities_equal_those_of_transformers_gpt2():
    ours, theirs = gpt2_pair(n_layers=2, n_heads=4)
    for query, result in query_likelihoods(ours.eval(), random_queries(61, 20)).items():
        ids = [*query.context, *query.continuation]
        expected = logprobs_of(theirs.eval(), ids, len(query.context))
        assert result.logprobs == pytest.approx(expected, abs=ROUNDING)


@torch.no_grad()
def plain_likelihood(model: Transformer, query: Query, top_k: int) -> Likelihood:
    """Return the likelihood from one forward pass without a cache."""
    ids = [*query.context, *query.continuation]
    logits = model(torch.tensor([ids]))[0, len(query.context) - 1 : -1]
    targets = torch.tensor(query.continuation)
    top = logits[0].softmax(-1).topk(top_k)
    return Likelihood(
        logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist(),
        greedy=logits.argmax(-1).tolist() == targets.tolist(),
        rank=logits[0].argsort(descending=True).tolist().index(query.continuation[0]) + 1,
        top=list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )


@pytest.mark.parametrize("options", [{}, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("tokens, positions", [(4096, 256), (4096, 2), (16, 3), (1, 1)])
def test_likelihoods_equal_a_plain_loop_over_whole_texts(monkeypatch, tokens, positions, options):
    """The size of a batch makes no difference."""
    monkeypatch.setattr(likelihood, "MAX_BATCH_TOKENS", tokens)
    monkeypatch.setattr(likelihood, "MAX_LOGIT_ROWS", positions)
    model, queries = make_model(61, **options), random_queries(61)
    if model.shift_gain is not None:
        torch.nn.init.ones_(model.shift_gain)  # it begins at 0
    likelihoods = query_likelihoods(model, queries + queries[:5], top_k=3)
    assert list(likelihoods) == list(dict.fromkeys(queries))
    for query, result in likelihoods.items():
        expected = plain_likelihood(model, query, top_k=3)
        assert result.logprobs == pytest.approx(expected.logprobs, abs=ROUNDING)
        assert (result.greedy, result.rank) == (expected.greedy, expected.rank)
        assert [token for token, _ in result.top] == [token for token, _ in expected.top]
        probabilities = [p for _, p in expected.top]
        assert [p for _, p in result.top] == pytest.approx(probabilities, rel=1e-5)  # two softmaxes


def test_greedy_is_about_the_whole_continuation():
    model = make_model(61)
    ids = [5]
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    greedy, last_wrong = Query((5,), tuple(ids[1:])), Query((5,), (*ids[1:4], (ids[4] + 1) % 61))
    likelihoods = query_likelihoods(model, [greedy, last_wrong])
    assert (likelihoods[greedy].greedy, likelihoods[last_wrong].greedy) == (True, False)
    assert likelihoods[last_wrong].rank == 1


def test_candidates_of_one_context_share_its_forward_pass(monkeypatch):
    """The context is fed once; then all continuations, each without its last token."""
    model, shapes = make_model(), []
    hidden = Transformer.hidden

    def record_shape(self, ids, **more):
        shapes.append(tuple(ids.shape))
        return hidden(self, ids, **more)

    monkeypatch.setattr(Transformer, "hidden", record_shape)
    distractors = (" jk", " l", " m")
    case = Case("x", "choice", prompt="abcdefgh", answers=(" i",), distractors=distractors)
    scores_of(model, NO_PREFIX, [case])
    assert shapes == [(1, 8), (4, 2)]


def test_a_hand_worked_model_of_three_tokens():
    """The answer has the product of its tokens' probabilities, not those of another position."""
    tokenizer = CharTokenizer("abc")
    rows = {"": {"a": 0.5}, "a": {"b": 0.25, "a": 0.125}, "b": {"c": 0.1, "b": 0.6}}
    model = bigram_model(bigram_table(tokenizer, rows | {"c": {"c": 0.9}}))
    [score] = scores_of(model, tokenizer, [Case("x", prompt="a", answers=("bc",))])
    assert score.logprob == pytest.approx(math.log(0.25 * 0.1), abs=ROUNDING)
    wrong = {
        "a position early": 0.5 * 0.25,
        "a position late": 0.1 * 0.9,
        "only the first token": 0.25,
        "with the prompt": 0.5 * 0.25 * 0.1,
    }
    for p in wrong.values():
        assert abs(score.logprob - math.log(p)) > 0.5
    assert (score.tokens, score.bytes, score.first_token_rank) == (2, 2, 1)
    assert (score.greedy, score.correct) == (False, 0.0)
    assert score.top[0] == ("b", pytest.approx(0.25, abs=ROUNDING))


def test_a_batch_of_cases_scores_as_each_case_alone():
    """Padding and the other rows of a batch have no effect."""
    model, tokenizer = make_model(), ByteTokenizer()
    texts = dict(answers=(" three" * 8,), distractors=(" " + "z" * 50,))
    long = Case("long", "choice", prompt="one two", **texts)
    together = scores_of(model, tokenizer, [*CASES, long])[:-1]
    alone = [scores_of(model, tokenizer, [case])[0] for case in CASES]
    for a, b in zip(together, alone, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=ROUNDING)
        assert a.margin == (b.margin and pytest.approx(b.margin, abs=ROUNDING))
        assert (a.case, a.rank, a.greedy) == (b.case, b.rank, b.greedy)
        assert (a.first_token_rank, a.correct) == (b.first_token_rank, b.correct)


def test_log_probabilities_are_computed_in_float32():
    """They are near those of float64; a softmax in bfloat16 is a hundred times further away."""
    model = make_model()
    ids = [256, *b"one two three four"]
    query = Query(tuple(ids[:8]), tuple(ids[8:]))
    exact = math.fsum(logprobs_of(make_model().double(), ids, 8))
    result = query_likelihoods(model, [query])[query].logprob
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, 7:-1].bfloat16().log_softmax(-1)
    rough = logits.gather(1, torch.tensor(ids[8:])[:, None]).sum().item()
    assert result == pytest.approx(exact, abs=ROUNDING)
    assert abs(rough - exact) > 100 * ROUNDING


def test_log_probabilities_of_a_bfloat16_model_are_a_float32_softmax_of_its_logits():
    ids = [256, *b"one two three four"]
    model = make_model().bfloat16()
    with torch.no_grad():
        expected = model(torch.tensor([ids[:8]]))[0, -1].float().log_softmax(-1)[ids[8]].item()
    query = Query(tuple(ids[:8]), (ids[8],))
    result = query_likelihoods(model, [query])[query].logprob
    assert result == pytest.approx(expected, abs=1e-6)
