"""Scores against transformers, a plain loop over whole texts, and models of which every probability is known.

Each mistake that a naive evaluator makes has a test in which it gets another number.
"""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from model import Transformer
from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.evaluation import likelihood
from pocketlm.evaluation.cases import Case
from pocketlm.evaluation.likelihood import Query, query_likelihoods
from pocketlm.evaluation.scoring import Score, encode_case, score_cases
from pocketlm.inference.generate import complete
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.bigrams import bigram, table
from tests.support.gpt2 import gpt2_pair
from tests.support.models import reference_of

ROUNDING = 1e-5  # nats of a sum of up to 20 log-probabilities in float32, each rounded at 1e-6; measured: 1e-6
BPE = JsonTokenizer.train_bpe(["abc abc abc xyz one two three three"] * 50, 275)
NO_PREFIX = ByteTokenizer(bos=False, eos=False)
WORDS = [
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


def make_model(vocab_size: int = 257, **changes) -> Transformer:
    """Random, and far enough from its first weights that scores differ."""
    torch.manual_seed(0)
    model = {
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": vocab_size,
        "max_seq_len": 64,
    } | changes
    transformer = Transformer(
        config_from_dict({"model": model, "training": {"seq_len": model["max_seq_len"]}}).model
    ).eval()
    for p in transformer.parameters():
        p.data.mul_(5) if p.dim() == 2 else None
    return transformer


@torch.no_grad()
def logprobs_of(model: torch.nn.Module, ids: list[int], start: int) -> list[float]:
    """Of ids[start:], from a forward pass over the whole."""
    out = model(torch.tensor([ids]))
    logits = out if isinstance(out, Tensor) else out.logits
    return [logits[0, t - 1].log_softmax(-1)[ids[t]].item() for t in range(start, len(ids))]


def scores_of(
    model: Transformer, tokenizer: Tokenizer, cases: list[Case], top_k: int = 5
) -> list[Score]:
    return score_cases(
        model,
        tokenizer,
        [encode_case(tokenizer, case, model.config.max_seq_len) for case in cases],
        top_k,
    )


# ---- log-probabilities ----


def test_scores_equal_the_loss_sums_of_transformers_llama():
    """LlamaForCausalLM with labels on the continuation alone: its mean loss times the continuation's tokens."""
    model = make_model()
    llama = reference_of(model).eval()
    for case, score in zip(WORDS, scores_of(model, ByteTokenizer(), WORDS), strict=True):
        sums = []
        for context, continuation in case.candidates:
            ids = [256, *(context + continuation).encode()]
            n = len(continuation.encode())
            with torch.no_grad():
                out = llama(
                    torch.tensor([ids]), labels=torch.tensor([[-100] * (len(ids) - n) + ids[-n:]])
                )
            sums.append(-out.loss.item() * n)
            if case.type == "minimal_pair":  # of which no prompt asks for the first token
                assert (score.top, score.first_token_rank, score.greedy) == ((), None, None)
            elif len(sums) == 1:
                first = out.logits[0, len(ids) - n - 1].log_softmax(-1)
                assert score.top[0][1] == pytest.approx(
                    first.max().exp().item(), rel=1e-4
                )  # float32 and float32's softmax
                if case.n_right == 1:
                    assert (
                        score.first_token_rank
                        == int((first.argsort(descending=True) == ids[-n]).nonzero()) + 1
                    )
        right = torch.tensor(sums[: case.n_right]).logsumexp(0).item()
        assert score.logprob == pytest.approx(right, abs=1e-4)  # a mean in float32, multiplied back
        if len(sums) > case.n_right:
            assert score.margin == pytest.approx(
                max(sums[: case.n_right]) - max(sums[case.n_right :]), abs=1e-4
            )
            assert score.correct == float(sums.index(max(sums)) < case.n_right)


def random_requests(vocab_size: int, n: int = 60) -> list[Query]:
    """Continuations of 1 to 6 tokens behind contexts of 1 to 12, of which many share one."""
    rng = random.Random(0)

    def some(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(rng.randint(1, most)))

    contexts = [some(12) for _ in range(n // 4)]
    return [Query(rng.choice(contexts), some(6)) for _ in range(n)]


def test_log_probabilities_equal_those_of_transformers_gpt2():
    ours, theirs = gpt2_pair(n_layers=2, n_heads=4)
    requests = random_requests(61, 20)
    for request, found in query_likelihoods(ours.eval(), requests).items():
        expected = logprobs_of(
            theirs.eval(), [*request.context, *request.continuation], len(request.context)
        )
        assert found.logprobs == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("tokens, positions", [(4096, 256), (4096, 2), (16, 3), (1, 1)])
def test_answers_equal_a_plain_loop_over_whole_texts(monkeypatch, tokens, positions):
    """One forward pass without a cache for each request, however much goes into a pass of ours."""
    monkeypatch.setattr(likelihood, "TOKENS", tokens)
    monkeypatch.setattr(likelihood, "POSITIONS", positions)
    model, requests = make_model(61), random_requests(61)
    answers = query_likelihoods(model, requests + requests[:5], top_k=3)
    assert list(answers) == list(dict.fromkeys(requests))
    for request, found in answers.items():
        ids = [*request.context, *request.continuation]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, len(request.context) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(request.continuation)[:, None])[
            :, 0
        ]
        assert found.logprobs == pytest.approx(expected.tolist(), abs=ROUNDING)
        assert found.greedy == (logits.argmax(-1).tolist() == list(request.continuation))
        assert (
            found.rank
            == logits[0].argsort(descending=True).tolist().index(request.continuation[0]) + 1
        )
        best = logits[0].softmax(-1).topk(3)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [p for _, p in found.top] == pytest.approx(
            best.values.tolist(), rel=1e-5
        )  # float32, softmax of either kind


def test_greedy_is_told_of_the_whole_continuation():
    model = make_model(61)
    with torch.no_grad():
        ids = [5]
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    greedy, last_wrong = Query((5,), tuple(ids[1:])), Query((5,), (*ids[1:4], (ids[4] + 1) % 61))
    answers = query_likelihoods(model, [greedy, last_wrong])
    assert (answers[greedy].greedy, answers[last_wrong].greedy) == (True, False)
    assert answers[last_wrong].rank == 1


def test_candidates_of_one_context_share_its_forward_pass(monkeypatch):
    model, seen = make_model(), []
    hidden = Transformer.hidden
    monkeypatch.setattr(
        Transformer,
        "hidden",
        lambda self, ids, **more: seen.append(tuple(ids.shape)) or hidden(self, ids, **more),
    )
    scores_of(
        model,
        NO_PREFIX,
        [Case("x", "choice", prompt="abcdefgh", answers=(" i",), distractors=(" jk", " l", " m"))],
    )
    assert seen == [
        (1, 8),
        (4, 2),
    ]  # the context once; then all that follows, but for the last token


def test_a_hand_worked_model_of_three_tokens():
    """What follows "a" is known: the whole answer has the product, and not the probability of a place before or behind."""
    tokenizer = CharTokenizer("abc")
    model = bigram(
        table(
            tokenizer,
            {
                "": {"a": 0.5},
                "a": {"b": 0.25, "a": 0.125},
                "b": {"c": 0.1, "b": 0.6},
                "c": {"c": 0.9},
            },
        )
    )
    [score] = scores_of(model, tokenizer, [Case("x", prompt="a", answers=("bc",))])
    assert score.logprob == pytest.approx(math.log(0.25 * 0.1), abs=ROUNDING)
    shifted = (
        math.log(0.5 * 0.25),
        math.log(0.1 * 0.9),
        math.log(0.25),
        math.log(0.5 * 0.25 * 0.1),
    )
    assert (
        min(abs(score.logprob - wrong) for wrong in shifted) > 0.5
    )  # a place early, a place late, first alone, prompt too
    assert (score.tokens, score.bytes, score.first_token_rank, score.greedy, score.correct) == (
        2,
        2,
        1,
        False,
        0.0,
    )
    assert score.top[0] == ("b", pytest.approx(0.25, abs=ROUNDING))


def test_a_batch_of_cases_scores_as_each_case_alone():
    """Padding, and whatever else stands in the batch, is not seen."""
    model, tokenizer = make_model(), ByteTokenizer()
    long = Case(
        "long", "choice", prompt="one two", answers=(" three" * 8,), distractors=(" " + "z" * 50,)
    )
    together = scores_of(model, tokenizer, [*WORDS, long])[:-1]
    alone = [scores_of(model, tokenizer, [case])[0] for case in WORDS]
    assert [s.logprob for s in together] == pytest.approx([s.logprob for s in alone], abs=ROUNDING)
    assert [s.margin for s in together if s.margin] == pytest.approx(
        [s.margin for s in alone if s.margin], abs=ROUNDING
    )
    for a, b in zip(together, alone, strict=True):
        assert (a.case, a.rank, a.greedy, a.first_token_rank, a.correct) == (
            b.case,
            b.rank,
            b.greedy,
            b.first_token_rank,
            b.correct,
        )


def test_scores_are_of_float32_all_the_way():
    """Against float64; a softmax in bfloat16 is a hundred times further off than all of float32's roundings."""
    model = make_model()
    ids = [256, *b"one two three four"]
    request = Query(tuple(ids[:8]), tuple(ids[8:]))
    exact = math.fsum(logprobs_of(make_model().double(), ids, 8))
    got = query_likelihoods(model, [request])[request].logprob
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, 7:-1].bfloat16().log_softmax(-1)
    rough = logits.gather(1, torch.tensor(ids[8:])[:, None]).sum().item()
    assert got == pytest.approx(exact, abs=ROUNDING)
    assert abs(rough - exact) > 100 * ROUNDING
    half = model.bfloat16()
    with torch.no_grad():
        last = half(torch.tensor([ids[:8]]))[0, -1].float().log_softmax(-1)[ids[8]].item()
    assert query_likelihoods(half, [Query(request.context, request.continuation[:1])]).popitem()[
        1
    ].logprob == pytest.approx(last, abs=1e-6)


# ---- from text to tokens ----


def test_a_space_before_the_answer_belongs_to_the_answer():
    """ " three" is one token; a prompt that ends in a space has another last token, and asks for "three" behind it."""
    model = make_model(BPE.vocab_size)
    [score] = scores_of(model, BPE, [Case("x", prompt="one two", answers=(" three",))])
    ids = [*BPE.prefix, *BPE.encode("one two three")]
    assert score.tokens == 1
    assert score.logprob == pytest.approx(logprobs_of(model, ids, len(ids) - 1)[0], abs=ROUNDING)
    before = [*BPE.prefix, *BPE.encode("one two ")]
    naive = math.fsum(logprobs_of(model, before + BPE.encode("three"), len(before)))
    assert abs(naive - score.logprob) > 0.1


def test_prompt_and_answer_are_encoded_as_one_text():
    """ "xyz ab" and "c" are "xyz", " abc" together: what is asked begins with the token that joins them, and `merged` says so."""
    model, case = make_model(BPE.vocab_size), Case("m", prompt="xyz ab", answers=("c",))
    encoded = encode_case(BPE, case, 64)
    whole = [*BPE.prefix, *BPE.encode("xyz abc")]
    [request] = encoded.requests
    assert [*request.context, *request.continuation] == whole
    assert BPE.decode(request.continuation) == " abc"
    [score] = score_cases(model, BPE, [encoded])
    assert (score.merged, score.tokens) == (True, 1)
    assert score.logprob == pytest.approx(
        logprobs_of(model, whole, len(whole) - 1)[0], abs=ROUNDING
    )
    apart = [*BPE.prefix, *BPE.encode("xyz ab"), *BPE.encode("c")]
    assert abs(logprobs_of(model, apart, len(apart) - 1)[0] - score.logprob) > 1000 * ROUNDING
    assert not encode_case(BPE, Case("n", prompt="xyz", answers=(" abc",)), 64).merged


def test_candidates_begin_together_where_only_one_of_them_is_joined_to_the_prompt():
    """Their difference is that of the whole texts; else one would be asked for "ab" once more, and the others would not."""
    model, case = (
        make_model(BPE.vocab_size),
        Case("m", "choice", prompt="xyz ab", answers=("c",), distractors=("z", "q")),
    )
    [score] = scores_of(model, BPE, [case])
    whole = [
        math.fsum(logprobs_of(model, [*BPE.prefix, *BPE.encode("xyz ab" + text)], 1))
        for text in "czq"
    ]
    assert score.merged
    assert score.margin == pytest.approx(whole[0] - max(whole[1:]), abs=ROUNDING)
    assert score.rank == 1 + sum(other > whole[0] for other in whole[1:])


def test_the_token_that_begins_a_document_stands_before_every_prompt_as_in_training():
    for tokenizer, prefix in [
        (ByteTokenizer(), [256]),
        (ByteTokenizer(bos=True), [256]),
        (NO_PREFIX, []),
    ]:
        [request] = encode_case(tokenizer, Case("x", prompt="ab", answers=(" c",)), 64).requests
        assert request == Query((*prefix, *b"ab"), tuple(b" c"))
        [request] = encode_case(
            tokenizer, Case("x", "generate", prompt="ab", match="c"), 64
        ).requests
        assert request == Query((*prefix, *b"ab"), ())


@pytest.mark.parametrize("case, tokens", [
    (Case("it", "choice", prompt="p" * 12, answers=(" a",), distractors=(" bcd",)), 17),
    (Case("it", "minimal_pair", good="g" * 5, bad="b" * 16), 17),
    (Case("it", "schema", contexts=("c" * 14, "c"), continuation=" d"), 17),
    (Case("it", "generate", prompt="p" * 15, match="a"), 16),
    (Case("it", "choice", prompt="p", answers=(" a",), distractors=(" b",), pmi_prompt="q" * 14), 17),
])  # fmt: skip
def test_what_does_not_fit_the_context_is_refused_by_name_and_never_cut(case, tokens):
    encode_case(ByteTokenizer(), case, 16)
    with pytest.raises(
        UserError, match=f"the case 'it' has {tokens} tokens and the model a context of 15"
    ):
        encode_case(ByteTokenizer(), case, 15)


def test_the_longest_case_that_fits_is_answered():
    case = Case("it", "choice", prompt="p" * 12, answers=(" abc",), distractors=(" d",))
    model = make_model(max_seq_len=16)
    [score] = scores_of(
        model, ByteTokenizer(), [case]
    )  # 17 tokens, of which the last only is asked
    whole = [256, *("p" * 12 + " abc").encode()]
    assert score.logprob == pytest.approx(
        math.fsum(logprobs_of(make_model(), whole, 13)), abs=ROUNDING
    )


# ---- what is right ----

LETTERS = CharTokenizer("abhkxyz한")


def test_the_whole_answer_counts_and_not_its_first_token_alone():
    """ "ab" begins with the likeliest token and is the unlikelier one."""
    model = bigram(table(LETTERS, {"x": {"a": 0.6, "b": 0.3}, "a": {"b": 0.01}, "b": {"a": 0.9}}))
    [score] = scores_of(
        model, LETTERS, [Case("x", "choice", prompt="x", answers=("ab",), distractors=("ba",))]
    )
    assert (score.first_token_rank, score.rank, score.correct) == (1, 2, 0.0)
    assert score.margin == pytest.approx(math.log(0.6 * 0.01) - math.log(0.3 * 0.9), abs=ROUNDING)
    assert score.logprob == pytest.approx(math.log(0.6 * 0.01), abs=ROUNDING)


UNEQUAL = {
    "x": {"a": 0.5, "한": 0.15},
    "a": {"a": 0.5},
    "": {"a": 0.01, "한": 0.6},
    "y": {"a": 0.75, "한": 0.01},
}
BY = {  # of four letters of 1 byte against one of 3
    "sum": (4 * math.log(0.5), math.log(0.15)),
    "token": (math.log(0.5), math.log(0.15)),
    "byte": (math.log(0.5), math.log(0.15) / 3),
    "pmi": (math.log(0.5 / 0.01), math.log(0.15 / 0.6)),
}


@pytest.mark.parametrize("by", BY)
def test_answers_of_other_lengths_are_compared_by_sum_token_byte_and_pmi_side_by_side_and_the_case_says_which_decides(
    by,
):
    """By sum the short one wins, by tokens the long one, by bytes the one of many bytes, by PMI the unexpected one."""
    case = Case("x", "choice", prompt="x", answers=("aaaa",), distractors=("한",), scoring=by)
    [score] = scores_of(bigram(table(LETTERS, UNEQUAL)), LETTERS, [case])
    assert score.correct_by == {"sum": 0.0, "token": 1.0, "byte": 0.0, "pmi": 1.0}
    assert {
        name: float(right > wrong) for name, (right, wrong) in BY.items()
    } == score.correct_by  # by hand
    assert score.correct == score.correct_by[by]
    assert score.rank == 2 - score.correct
    right, wrong = BY[by]
    assert score.margin == pytest.approx(right - wrong, abs=ROUNDING)
    assert score.logprob == pytest.approx(
        BY["sum"][0], abs=ROUNDING
    )  # of what it is, whatever decides
    p = math.exp(BY["sum"][0]) / (math.exp(BY["sum"][0]) + 0.15)
    assert score.p_correct == pytest.approx(p, abs=ROUNDING)
    assert (score.tokens, score.bytes) == (4, 4)


def test_pmi_takes_the_case_s_own_prompt_where_it_has_one():
    """Behind "y" the letters are likelier than behind "x", and so the other one gains."""
    case = Case(
        "x",
        "choice",
        prompt="x",
        answers=("aaaa",),
        distractors=("한",),
        scoring="pmi",
        pmi_prompt="y",
    )
    model = bigram(table(LETTERS, UNEQUAL))
    [score] = scores_of(model, LETTERS, [case])
    assert score.margin == pytest.approx(math.log(0.5 / 0.75) - math.log(0.15 / 0.01), abs=ROUNDING)
    assert score.correct == 0.0
    bare = CharTokenizer(LETTERS.symbols, eos=False)
    [score] = scores_of(bigram(torch.full((9, 9), 1 / 9)), bare, [case])
    assert "pmi" in score.correct_by


def test_pmi_without_a_token_that_begins_a_document_needs_a_prompt_of_its_own():
    case = Case("x", "choice", prompt="x", answers=("a",), distractors=("b",))
    [score] = scores_of(make_model(256), NO_PREFIX, [case])
    assert list(score.correct_by) == ["sum", "token", "byte"]
    with pytest.raises(UserError, match="'x' is scored by pmi, for which 'byte' has no token"):
        scores_of(
            make_model(256),
            NO_PREFIX,
            [Case("x", "choice", prompt="x", answers=("a",), distractors=("b",), scoring="pmi")],
        )
    joined = Case(
        "x", "choice", prompt="xyz ab", answers=("c",), distractors=("z",), pmi_prompt=" ab"
    )
    with pytest.raises(UserError, match="'x' has nothing before what is asked"):
        encode_case(BPE.with_ends(None, False), joined, 64)


SAME = [
    Case("two", "choice", prompt="x", answers=("ab",), distractors=("kh",)),
    Case("four", "cloze", prompt="x", answers=("ab",), distractors=("kh", "zz", "xy")),
    Case("two right", "choice", prompt="x", answers=("ab", "ba"), distractors=("kh", "zz", "xy")),
    Case("pair", "minimal_pair", good="aba", bad="abb"),
    Case("schema", "schema", contexts=("ab", "kh", "zzz"), continuation="x", gold=1),
]


def test_a_model_that_knows_nothing_scores_chance_exactly_and_every_tie_is_reported():
    """All candidates alike: where the first of equals wins, as in many an evaluator, this scores 100 %."""
    model = make_model(LETTERS.vocab_size)
    model.embed_tokens.weight.data.zero_()
    for case, score in zip(SAME, scores_of(model, LETTERS, SAME), strict=True):
        assert score.correct == case.chance == case.n_right / len(case.candidates)
        assert score.p_correct == pytest.approx(case.chance, abs=1e-12)  # float64
        assert set(score.correct_by.values()) == {case.chance}
        assert score.tie
        assert (score.rank, score.margin) == (1, 0)


def test_answers_that_tie_with_each_other_only_are_no_tie():
    model = bigram(table(LETTERS, {"x": {"a": 0.3, "b": 0.3, "k": 0.1}}))
    [score] = scores_of(
        model, LETTERS, [Case("x", "choice", prompt="x", answers=("a", "b"), distractors=("k",))]
    )
    assert (score.correct, score.tie) == (1.0, False)
    [score] = scores_of(
        model, LETTERS, [Case("x", "choice", prompt="x", answers=("a", "k"), distractors=("b",))]
    )
    assert (score.correct, score.tie) == (0.5, True)


def test_any_of_the_answers_is_right():
    """The probability is that of all of them, the rank that of the best; the distance to the truth is that of them together."""
    model = bigram(table(LETTERS, {"x": {"a": 0.3, "b": 0.1, "k": 0.2, "h": 0.25}}))
    [score] = scores_of(
        model,
        LETTERS,
        [Case("x", "choice", prompt="x", answers=("b", "h"), distractors=("a", "k"))],
    )
    assert score.logprob == pytest.approx(math.log(0.35), abs=ROUNDING)
    assert (score.correct, score.rank, score.first_token_rank) == (0.0, 2, 2)
    assert score.p_correct == pytest.approx(0.35 / 0.85, abs=ROUNDING)
    assert score.margin == pytest.approx(math.log(0.25 / 0.3), abs=ROUNDING)
    assert score.brier == pytest.approx((0.5**2 + 0.3**2 + 0.2**2) / 0.85**2, abs=ROUNDING)


def test_without_distractors_an_answer_is_right_where_greedy_generation_writes_it():
    model = bigram(table(LETTERS, {"x": {"a": 0.3, "b": 0.2}, "a": {"b": 0.4}, "b": {"k": 0.9}}))
    for answers, right in [
        (("ab",), 1.0),
        (("abk",), 1.0),
        (("b",), 0.0),
        (("b", "a"), 1.0),
        (("aa",), 0.0),
    ]:
        [score] = scores_of(model, LETTERS, [Case("x", prompt="x", answers=answers)])
        assert (score.correct, score.greedy) == (right, bool(right)), answers
        assert (score.rank, score.p_correct, score.margin, score.brier, score.correct_by) == (
            None,
            None,
            None,
            None,
            {},
        )


def test_a_schema_asks_for_the_same_text_behind_each_context():
    model = bigram(
        table(LETTERS, {"a": {"x": 0.1}, "b": {"x": 0.4}, "k": {"x": 0.2}, "x": {"y": 0.5}})
    )
    for gold, right in enumerate((0.0, 1.0, 0.0)):
        case = Case("s", "schema", contexts=("za", "zzb", "k"), continuation="xy", gold=gold)
        [score] = scores_of(model, LETTERS, [case])
        p = (0.1, 0.4, 0.2)[gold]
        assert (score.correct, score.rank) == (right, (3, 1, 2)[gold])
        assert score.logprob == pytest.approx(math.log(p * 0.5), abs=ROUNDING)
        assert score.p_correct == pytest.approx(p / 0.7, abs=ROUNDING)
        assert list(score.correct_by) == ["sum", "token", "byte"]


def test_a_minimal_pair_compares_whole_texts():
    model = make_model()
    case = Case("x", "minimal_pair", good="The dogs bark.", bad="The dogs barks loud.")
    [score] = scores_of(model, ByteTokenizer(), [case])
    good, bad = (
        math.fsum(logprobs_of(model, [256, *text.encode()], 1)) for text in (case.good, case.bad)
    )
    assert score.logprob == pytest.approx(good, abs=ROUNDING)
    assert score.margin == pytest.approx(good - bad, abs=2 * ROUNDING)  # two sums
    assert (score.correct, score.tokens, score.bytes) == (float(good > bad), 14, 14)


def test_a_minimal_pair_without_a_begin_of_document_is_compared_behind_what_both_share():
    model = make_model(256)
    case = Case("x", "minimal_pair", good="The dogs bark.", bad="The dogs barks loud.")
    for request in encode_case(NO_PREFIX, case, 64).requests:
        assert request.context == tuple(b"The dogs bark")
    [score] = scores_of(model, NO_PREFIX, [case])
    good, bad = (logprobs_of(model, list(text.encode()), 1) for text in (case.good, case.bad))
    assert score.margin == pytest.approx(math.fsum(good) - math.fsum(bad), abs=2 * ROUNDING)
    assert score.logprob == pytest.approx(good[-1], abs=ROUNDING)
    with pytest.raises(
        UserError,
        match="the case 'y' has nothing before what is asked, and no token begins a document in 'byte'",
    ):
        encode_case(NO_PREFIX, Case("y", "minimal_pair", good="Dogs bark.", bad="A dog barks."), 64)


def test_a_text_that_has_no_token_is_refused_by_name():
    with pytest.raises(UserError, match="the case 'e' asks for a text that has no token in 'byte'"):
        encode_case(
            ByteTokenizer(), Case("e", "choice", prompt="a", answers=("",), distractors=("b",)), 64
        )


@pytest.mark.parametrize(
    "n_right, n_wrong, chance",
    [(1, 1, 1 / 2), (1, 3, 1 / 4), (2, 3, 2 / 5), (1, 0, None), (3, 0, None)],
)
def test_chance_is_the_share_of_right_candidates(n_right, n_wrong, chance):
    case = Case("x", prompt="x", answers=tuple("abc"[:n_right]), distractors=tuple("klm"[:n_wrong]))
    assert case.chance == chance
    assert Case("p", "minimal_pair", good="a", bad="b").chance == 0.5
    assert Case("s", "schema", contexts=("a", "b", "c"), continuation="d").chance == pytest.approx(
        1 / 3
    )
    assert (
        Case("t", "text", text="a").chance
        is Case("g", "generate", prompt="a", match="b").chance
        is None
    )


def test_a_score_with_a_number_that_is_not_finite_says_so_and_wins_nothing():
    for broken, wrong in itertools.product(("norm", "head"), ([], ["b"], ["b", "kk"])):
        model = bigram(table(LETTERS, {}))
        (model.norm if broken == "norm" else model.lm_head).weight.data[0] = math.nan
        [score] = scores_of(
            model, LETTERS, [Case("x", prompt="x", answers=("a",), distractors=tuple(wrong))]
        )
        assert not score.finite
        assert score.correct == 0
    model = bigram(table(LETTERS, {}))
    model.embed_tokens.weight.data[LETTERS.ids["k"]] = math.nan  # which only the wrong one looks at
    [score] = scores_of(
        model, LETTERS, [Case("x", "choice", prompt="x", answers=("a",), distractors=("kk",))]
    )
    assert not score.finite


# ---- texts ----


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), BPE, ByteTokenizer(bos=True), NO_PREFIX],
    ids=["eos", "bpe", "bos", "none"],
)
@pytest.mark.parametrize("context", [1, 5, 8, 64])
def test_bits_per_byte_equal_those_of_a_plain_loop_in_which_every_token_is_counted_once(
    tokenizer, context
):
    """Among it the same window again and again, and characters of several bytes."""
    text = "one two three, één twee drie. " + "ab" * 24
    model = make_model(tokenizer.vocab_size)
    [score] = scores_of_text(model, tokenizer, text, context)
    ids = [*tokenizer.prefix, *tokenizer.encode(text)]
    nats, counted = 0.0, []
    for start in range(0, len(ids) - 1, context):
        end = min(start + context, len(ids) - 1)
        begin = max(0, end - context)  # the last window reaches back
        window = ids[begin : end + 1]  # one more, which is asked
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]]))[0].log_softmax(-1)
        for t in range(start - begin, len(window) - 1):
            nats -= logits[t, window[t + 1]].item()
            counted.append(begin + t + 1)
    assert counted == list(
        range(1, len(ids))
    )  # all but the first, which is the prefix where there is one
    assert score.tokens == len(counted)
    assert score.bytes == len(text.encode()) == len(text) + 2
    assert score.bits_per_byte == pytest.approx(
        nats / math.log(2) / len(text.encode()), abs=ROUNDING
    )
    assert (score.correct, score.logprob, score.rank) == (None, None, None)


def scores_of_text(
    model: Transformer, tokenizer: Tokenizer, text: str, context: int
) -> list[Score]:
    return score_cases(
        model, tokenizer, [encode_case(tokenizer, Case("t", "text", text=text), context)]
    )


def test_a_text_of_a_file_scores_as_the_same_text_in_the_suite(tmp_path):
    (tmp_path / "a.txt").write_text("één, two, three\n", encoding="utf-8")
    model, tokenizer = make_model(), ByteTokenizer()
    there, here = scores_of(
        model,
        tokenizer,
        [
            Case("f", "text", file=str(tmp_path / "a.txt")),
            Case("t", "text", text="één, two, three\n"),
        ],
    )
    assert (there.bits_per_byte, there.bytes, there.tokens) == (
        here.bits_per_byte,
        here.bytes,
        here.tokens,
    )
    with pytest.raises(UserError, match="the case 'f' reads .*none.txt: .*No such file"):
        encode_case(tokenizer, Case("f", "text", file=str(tmp_path / "none.txt")), 64)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="the case 'f' reads .*b.txt"):
        encode_case(tokenizer, Case("f", "text", file=str(tmp_path / "b.txt")), 64)
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(UserError, match="the case 'f' asks for a text that has no token"):
        encode_case(tokenizer, Case("f", "text", file=str(tmp_path / "c.txt")), 64)
    with pytest.raises(UserError, match="the case 't' asks for a text that has no token"):
        encode_case(
            NO_PREFIX, Case("t", "text", text="x"), 64
        )  # of which nothing is left to ask behind it


# ---- generation ----


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
def test_a_generated_text_is_what_infer_writes_greedily(tokenizer):
    model = make_model(tokenizer.vocab_size)
    config = config_from_dict({})
    for prompt in ("one two", "a", "xyz ab"):
        params = SamplingParams(max_new_tokens=12, temperature=0.0)
        checkpoint = Checkpoint(None, model, tokenizer, config, 0, 0, None)
        expected = "".join(piece for _, piece in complete(checkpoint, prompt, params))
        [score] = scores_of(
            model, tokenizer, [Case("g", "generate", prompt=prompt, match=".", max_new_tokens=12)]
        )
        assert score.generated == expected
        assert expected


@pytest.mark.parametrize("match, forbid, right", [
    ("^kh", "", 1.0), ("h$", "", 1.0), ("a", "", 0.0), ("^h", "", 0.0), ("kh", "a", 1.0), ("kh", "h$", 0.0), ("[kx]h", "^$", 1.0),
])  # fmt: skip
def test_a_generated_text_is_right_where_it_matches_one_pattern_and_not_the_other(
    match, forbid, right
):
    """Behind "x" come "k", "h" and the end of the document, and nothing behind that."""
    model = bigram(
        table(LETTERS, {"x": {"k": 0.5}, "k": {"h": 0.5}, "h": {"": 0.5}, "": {"a": 0.5}})
    )
    [score] = scores_of(
        model, LETTERS, [Case("g", "generate", prompt="ax", match=match, forbid=forbid)]
    )
    assert (score.generated, score.correct) == ("kh", right)
    assert (score.logprob, score.rank, score.tie) == (None, None, False)


def test_as_many_tokens_are_generated_as_the_case_says():
    model = bigram(table(LETTERS, {"a": {"b": 0.5}, "b": {"a": 0.5}}))
    [score] = scores_of(
        model, LETTERS, [Case("g", "generate", prompt="a", match="b", max_new_tokens=5)]
    )
    assert score.generated == "babab"
