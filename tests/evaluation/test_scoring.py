"""What a score says, on models with known probabilities.

Each mistake of a naive evaluator has a test in which it would give another number.
"""

import math

import pytest
import torch

from model import Transformer
from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import Case
from pocketlm.evaluation.scoring import Score, encode_case
from pocketlm.inference.generate import complete
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.bigrams import bigram_model, bigram_table
from tests.support.probes import BPE, NO_PREFIX, ROUNDING, logprobs_of, make_model, scores_of

LETTERS = CharTokenizer("abhkxyz한")


def model_of(rows: dict[str, dict[str, float]]) -> Transformer:
    """Return a bigram model over LETTERS."""
    return bigram_model(bigram_table(LETTERS, rows))


def score_of(rows: dict[str, dict[str, float]], case: Case) -> Score:
    """Return the score of a bigram model over LETTERS on one case."""
    [score] = scores_of(model_of(rows), LETTERS, [case])
    return score


def choice(answers: str, distractors: str, **more: str) -> Case:
    """Return a case after "x"; the texts are separated by spaces."""
    right, wrong = tuple(answers.split()), tuple(distractors.split())
    return Case("x", "choice", prompt="x", answers=right, distractors=wrong, **more)


# ---- comparing candidates ----


def test_the_whole_answer_counts_and_not_its_first_token_alone():
    """The right answer "ab" begins with the most likely token and is the less likely answer."""
    rows = {"x": {"a": 0.6, "b": 0.3}, "a": {"b": 0.01}, "b": {"a": 0.9}}
    score = score_of(rows, choice("ab", "ba"))
    assert (score.first_token_rank, score.rank, score.correct) == (1, 2, 0.0)
    assert score.margin == pytest.approx(math.log(0.6 * 0.01) - math.log(0.3 * 0.9), abs=ROUNDING)
    assert score.logprob == pytest.approx(math.log(0.6 * 0.01), abs=ROUNDING)


UNEQUAL = {
    "x": {"a": 0.5, "한": 0.15},
    "a": {"a": 0.5},
    "": {"a": 0.01, "한": 0.6},
    "y": {"a": 0.75, "한": 0.01},
}
BY_HAND = {  # "aaaa" of four tokens and four bytes, against "한" of one token and three bytes
    "sum": (4 * math.log(0.5), math.log(0.15)),
    "token": (math.log(0.5), math.log(0.15)),
    "byte": (math.log(0.5), math.log(0.15) / 3),
    "pmi": (math.log(0.5 / 0.01), math.log(0.15 / 0.6)),
}


@pytest.mark.parametrize("scoring", BY_HAND)
def test_answers_are_compared_by_sum_token_byte_and_pmi_and_the_case_says_which_decides(scoring):
    """The short answer wins by sum, and by bytes; the long one per token, and by PMI."""
    score = score_of(UNEQUAL, choice("aaaa", "한", scoring=scoring))
    assert score.correct_by == {"sum": 0.0, "token": 1.0, "byte": 0.0, "pmi": 1.0}
    wins = {name: float(right > wrong) for name, (right, wrong) in BY_HAND.items()}
    assert score.correct_by == wins
    assert score.correct == wins[scoring]
    assert score.rank == 2 - score.correct
    right, wrong = BY_HAND[scoring]
    assert score.margin == pytest.approx(right - wrong, abs=ROUNDING)
    right, wrong = (math.exp(value) for value in BY_HAND["sum"])  # whatever decides
    assert score.logprob == pytest.approx(math.log(right), abs=ROUNDING)
    assert score.p_correct == pytest.approx(right / (right + wrong), abs=ROUNDING)
    assert (score.tokens, score.bytes) == (4, 4)


def test_pmi_takes_the_case_s_own_prompt_if_it_has_one():
    """After "y" the letter "a" is more likely than after "x", so PMI prefers the other answer."""
    case = choice("aaaa", "한", scoring="pmi", pmi_prompt="y")
    score = score_of(UNEQUAL, case)
    expected = math.log(0.5 / 0.75) - math.log(0.15 / 0.01)
    assert score.margin == pytest.approx(expected, abs=ROUNDING)
    assert score.correct == 0.0
    bare = CharTokenizer(LETTERS.symbols, eos=False)
    [score] = scores_of(bigram_model(torch.full((9, 9), 1 / 9)), bare, [case])
    assert "pmi" in score.correct_by


def test_pmi_without_a_token_that_begins_a_document_needs_a_prompt_of_its_own():
    [score] = scores_of(make_model(256), NO_PREFIX, [choice("a", "b")])
    assert list(score.correct_by) == ["sum", "token", "byte"]
    with pytest.raises(UserError, match="'x' is scored by pmi, for which 'byte' has no token"):
        scores_of(make_model(256), NO_PREFIX, [choice("a", "b", scoring="pmi")])
    fields = dict(prompt="xyz ab", answers=("c",), distractors=("z",), pmi_prompt=" ab")
    with pytest.raises(UserError, match="'x' has no token before the text to score"):
        encode_case(BPE.with_bos_eos(None, False), Case("x", "choice", **fields), 64)


SAME = [
    choice("ab", "kh"),
    Case("four", "cloze", prompt="x", answers=("ab",), distractors=("kh", "zz", "xy")),
    choice("ab ba", "kh zz xy"),
    Case("pair", "minimal_pair", good="aba", bad="abb"),
    Case("schema", "schema", contexts=("ab", "kh", "zzz"), continuation="x", gold=1),
]


@pytest.mark.parametrize("case", SAME, ids=["two", "four", "two right", "pair", "schema"])
def test_a_model_that_knows_nothing_scores_chance_exactly_and_every_tie_is_reported(case):
    """All candidates are equal. An evaluator that takes the first of them would report 100 %."""
    model = make_model(LETTERS.vocab_size)
    model.embed_tokens.weight.data.zero_()
    [score] = scores_of(model, LETTERS, [case])
    assert score.correct == case.chance == case.n_right / len(case.candidates)
    assert score.p_correct == pytest.approx(case.chance, abs=1e-12)  # float64
    assert set(score.correct_by.values()) == {case.chance}
    assert score.tie
    assert (score.rank, score.margin) == (1, 0)


def test_a_tie_between_right_answers_is_no_tie():
    rows = {"x": {"a": 0.3, "b": 0.3, "k": 0.1}}
    score = score_of(rows, choice("a b", "k"))
    assert (score.correct, score.tie) == (1.0, False)
    score = score_of(rows, choice("a k", "b"))
    assert (score.correct, score.tie) == (0.5, True)


def test_any_of_the_answers_is_right():
    """The probability is that of all answers, the rank that of the best one."""
    score = score_of({"x": {"a": 0.3, "b": 0.1, "k": 0.2, "h": 0.25}}, choice("b h", "a k"))
    assert score.logprob == pytest.approx(math.log(0.35), abs=ROUNDING)
    assert (score.correct, score.rank, score.first_token_rank) == (0.0, 2, 2)
    assert score.p_correct == pytest.approx(0.35 / 0.85, abs=ROUNDING)
    assert score.margin == pytest.approx(math.log(0.25 / 0.3), abs=ROUNDING)
    assert score.brier == pytest.approx((0.5**2 + 0.3**2 + 0.2**2) / 0.85**2, abs=ROUNDING)


@pytest.mark.parametrize(
    "answers, right", [("ab", 1.0), ("abk", 1.0), ("b", 0.0), ("b a", 1.0), ("aa", 0.0)]
)
def test_without_distractors_an_answer_is_right_if_greedy_decoding_writes_it(answers, right):
    rows = {"x": {"a": 0.3, "b": 0.2}, "a": {"b": 0.4}, "b": {"k": 0.9}}
    score = score_of(rows, Case("x", prompt="x", answers=tuple(answers.split())))
    assert (score.correct, score.greedy) == (right, bool(right))
    assert (score.comparison, score.rank, score.p_correct) == (None, None, None)
    assert (score.margin, score.brier, score.correct_by) == (None, None, {})


@pytest.mark.parametrize("gold, p, rank", [(0, 0.1, 3), (1, 0.4, 1), (2, 0.2, 2)])
def test_a_schema_scores_the_same_text_after_each_context(gold, p, rank):
    rows = {"a": {"x": 0.1}, "b": {"x": 0.4}, "k": {"x": 0.2}, "x": {"y": 0.5}}
    case = Case("s", "schema", contexts=("za", "zzb", "k"), continuation="xy", gold=gold)
    score = score_of(rows, case)
    assert (score.correct, score.rank) == (float(rank == 1), rank)
    assert score.logprob == pytest.approx(math.log(p * 0.5), abs=ROUNDING)
    assert score.p_correct == pytest.approx(p / 0.7, abs=ROUNDING)
    assert list(score.correct_by) == ["sum", "token", "byte"]


PAIR = Case("x", "minimal_pair", good="The dogs bark.", bad="The dogs barks loud.")


def test_a_minimal_pair_compares_whole_texts():
    model = make_model()
    [score] = scores_of(model, ByteTokenizer(), [PAIR])
    texts = ([256, *text.encode()] for text in (PAIR.good, PAIR.bad))
    good, bad = (math.fsum(logprobs_of(model, ids, 1)) for ids in texts)
    assert score.logprob == pytest.approx(good, abs=ROUNDING)
    assert score.margin == pytest.approx(good - bad, abs=2 * ROUNDING)  # two sums
    assert (score.correct, score.tokens, score.bytes) == (float(good > bad), 14, 14)


def test_a_minimal_pair_without_a_document_prefix_is_compared_after_the_common_start():
    model = make_model(256)
    for query in encode_case(NO_PREFIX, PAIR, 64).queries:
        assert query.context == tuple(b"The dogs bark")
    [score] = scores_of(model, NO_PREFIX, [PAIR])
    good, bad = (logprobs_of(model, list(text.encode()), 1) for text in (PAIR.good, PAIR.bad))
    assert score.margin == pytest.approx(math.fsum(good) - math.fsum(bad), abs=2 * ROUNDING)
    assert score.logprob == pytest.approx(good[-1], abs=ROUNDING)
    other = Case("y", "minimal_pair", good="Dogs bark.", bad="A dog barks.")
    message = "'y' has no token before the text to score, and no token begins a document in 'byte'"
    with pytest.raises(UserError, match=message):
        encode_case(NO_PREFIX, other, 64)


# ---- chance, and broken models ----


@pytest.mark.parametrize(
    "case, chance",
    [
        (choice("a", "k"), 1 / 2),
        (choice("a", "k l m"), 1 / 4),
        (choice("a b", "k l m"), 2 / 5),
        (Case("one", prompt="x", answers=("a",)), None),
        (Case("three", prompt="x", answers=("a", "b", "c")), None),
        (Case("pair", "minimal_pair", good="a", bad="b"), 1 / 2),
        (Case("schema", "schema", contexts=("a", "b", "c"), continuation="d"), 1 / 3),
        (Case("text", "text", text="a"), None),
        (Case("generate", "generate", prompt="a", match="b"), None),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_chance_is_the_share_of_right_candidates(case, chance):
    assert case.chance == chance


@pytest.mark.parametrize("broken", ["norm", "lm_head"])
@pytest.mark.parametrize("distractors", [(), ("b",), ("b", "kk")])
def test_a_score_that_is_not_finite_says_so_and_is_wrong(broken, distractors):
    model = model_of({})
    getattr(model, broken).weight.data[0] = math.nan
    case = Case("x", prompt="x", answers=("a",), distractors=distractors)
    [score] = scores_of(model, LETTERS, [case])
    assert not score.finite
    assert score.correct == 0


def test_a_score_is_not_finite_if_only_a_wrong_candidate_is_not():
    model = model_of({})
    model.embed_tokens.weight.data[LETTERS.ids["k"]] = math.nan
    [score] = scores_of(model, LETTERS, [choice("a", "kk")])
    assert not score.finite


# ---- generation ----


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
@pytest.mark.parametrize("prompt", ["one two", "a", "xyz ab"])
def test_a_generated_text_is_what_infer_writes_greedily(tokenizer, prompt):
    model = make_model(tokenizer.vocab_size)
    params = SamplingParams(max_new_tokens=12, temperature=0.0)
    checkpoint = Checkpoint(None, model, tokenizer, config_from_dict({}), 0, 0, None)
    expected = "".join(piece for _, piece in complete(checkpoint, prompt, params))
    case = Case("g", "generate", prompt=prompt, match=".", max_new_tokens=12)
    [score] = scores_of(model, tokenizer, [case])
    assert score.generated == expected
    assert expected


@pytest.mark.parametrize(
    "match, forbid, right",
    [
        ("^kh", "", 1.0),
        ("h$", "", 1.0),
        ("a", "", 0.0),
        ("^h", "", 0.0),
        ("kh", "a", 1.0),
        ("kh", "h$", 0.0),
        ("[kx]h", "^$", 1.0),
    ],
)
def test_a_generated_text_is_right_if_it_matches_one_pattern_and_not_the_other(
    match, forbid, right
):
    """After "x" come "k", "h" and the end of the document, which ends the text."""
    rows = {"x": {"k": 0.5}, "k": {"h": 0.5}, "h": {"": 0.5}, "": {"a": 0.5}}
    score = score_of(rows, Case("g", "generate", prompt="ax", match=match, forbid=forbid))
    assert (score.generated, score.correct) == ("kh", right)
    assert (score.logprob, score.rank, score.tie) == (None, None, False)


def test_the_case_limits_the_number_of_generated_tokens():
    rows = {"a": {"b": 0.5}, "b": {"a": 0.5}}
    score = score_of(rows, Case("g", "generate", prompt="a", match="b", max_new_tokens=5))
    assert score.generated == "babab"
