"""Results: the order of checkpoints, the numbers of a category, and comparisons in pairs.

The checkpoints are bigram models, so a test chooses which cases each of them has right.
"""

import math
import shutil
from pathlib import Path
from string import ascii_lowercase

import pytest
import torch

from pocketlm.checkpoint.format import save_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import Case, load_suite
from pocketlm.evaluation.results import (
    Result,
    evaluate,
    first_step_above_chance,
    learned_and_forgotten,
    summarise,
)
from pocketlm.evaluation.scoring import Comparison, Score, encode_case, score_cases
from pocketlm.evaluation.statistics import mean_interval, wilson_interval
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.bigrams import LETTERS, bigram_model, bigram_table, make_checkpoint, save_model
from tests.support.probes import LETTER_CASES, LETTER_SUITE, read_suite

EXACT = 1e-6  # float32 log-probabilities of one letter, made into a probability


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, which holds only the suite."""
    monkeypatch.chdir(tmp_path)
    Path("cases.yaml").write_text(LETTER_SUITE)
    return tmp_path


def evaluate_letters(*paths: str) -> list[Result]:
    return evaluate(list(paths), load_suite("cases.yaml"))


# ---- evaluating checkpoints ----


def test_the_better_checkpoint_is_first_and_copies_of_the_same_weights_share_a_result():
    make_checkpoint("step-1.ckpt", LETTER_CASES[:6])
    shutil.copy("step-1.ckpt", "last.ckpt")
    make_checkpoint("other.ckpt", LETTER_CASES[:6], step=2)  # another file with the same weights
    make_checkpoint("trained.ckpt", LETTER_CASES[:20])
    results = evaluate_letters("step-1.ckpt", "trained.ckpt", "last.ckpt", "other.ckpt")
    assert [result.names for result in results] == [
        ["trained.ckpt"],
        ["step-1.ckpt", "last.ckpt", "other.ckpt"],
    ]
    assert [result.macro for result in results] == [(1 + 8 / 12) / 2, 6 / 12 / 2]


def test_the_same_weights_with_another_tokenizer_are_another_model():
    """With "A" and "B" exchanged, all that was right is wrong."""
    make_checkpoint("a.ckpt", LETTER_CASES)
    swapped = CharTokenizer("BA" + ascii_lowercase)
    state = torch.load("a.ckpt", weights_only=True)
    state["kit"]["tokenizer"] = swapped.state()
    save_checkpoint(state, Path("b.ckpt"))
    first, second = evaluate_letters("b.ckpt", "a.ckpt")
    assert first.weights_sha256 == second.weights_sha256
    assert (first.names, first.macro) == (["a.ckpt"], 1)
    assert (second.names, second.macro) == (["b.ckpt"], 0)
    assert first.tokenizer_sha256 == LETTERS.fingerprint
    assert second.tokenizer_sha256 == swapped.fingerprint


def test_checkpoints_with_different_vocabularies_are_each_scored_in_their_own_tokens():
    make_checkpoint("char.ckpt", LETTER_CASES[:7])
    other = CharTokenizer("".join(reversed("?!AB" + ascii_lowercase)), bos=True)
    make_checkpoint("other.ckpt", LETTER_CASES[:9], tokenizer=other)
    results = evaluate_letters("other.ckpt", "char.ckpt")
    for result, right in zip(results, (LETTER_CASES[:9], LETTER_CASES[:7]), strict=True):
        assert [score.case.id for score in result.scores if score.correct] == list(right)
        for score in result.scores:
            p = 0.6 if score.correct else 0.2
            assert score.logprob == pytest.approx(math.log(p), abs=EXACT)
    assert evaluate_letters("char.ckpt")[0].scores == results[1].scores


def test_the_tokenizer_is_checked_on_request():
    make_checkpoint("char.ckpt", "")
    with pytest.raises(UserError, match="was trained with the tokenizer 'char', not 'byte'"):
        evaluate(["char.ckpt"], load_suite("cases.yaml"), "byte")


TEXT = "schema: 1\ncases: [{id: t, type: text, text: zzzzz}]"
ONE = "schema: 1\ncases: [{id: t, type: choice, prompt: a, answers: [A], distractors: [B]}]"


@pytest.mark.parametrize("suite", [TEXT, ONE], ids=["bits per byte", "log-probability"])
def test_equal_accuracies_are_ranked_by_log_probability_and_texts_by_bits_per_byte(suite):
    for name, p in (("better", 0.3), ("worse", 0.25)):
        table = bigram_table(LETTERS, {"z": {"z": p}, "a": {"A": p, "B": 0.1}})
        save_model(f"{name}.ckpt", bigram_model(table), LETTERS)
    results = evaluate(["worse.ckpt", "better.ckpt"], read_suite(suite))
    assert [result.names for result in results] == [["better.ckpt"], ["worse.ckpt"]]


def test_dropout_is_off():
    """With half of the activations dropped, no two passes would agree."""
    make_checkpoint("a.ckpt", LETTER_CASES[:6], dropout=0.5)
    [first], [second] = (evaluate_letters("a.ckpt") for _ in range(2))
    assert first.scores == second.scores
    for score in first.scores:
        assert score.p_correct == pytest.approx(0.75 if score.correct else 0.25, abs=EXACT)
    model = load_checkpoint("a.ckpt").model.train()
    encoded = [encode_case(LETTERS, case, 16) for case in load_suite("cases.yaml").cases]
    pairs = zip(score_cases(model, LETTERS, encoded), first.scores, strict=True)
    assert max(abs(a.p_correct - b.p_correct) for a, b in pairs) > 0.1


def test_bfloat16_weights_are_scored_in_float32():
    rows = {letter: {"A": 0.6, "B": 0.2} for letter in LETTER_CASES}
    model = bigram_model(bigram_table(LETTERS, rows)).bfloat16()
    save_model("half.ckpt", model, LETTERS)
    save_model("same.ckpt", model.float(), LETTERS)
    [both] = evaluate_letters("half.ckpt", "same.ckpt")
    assert both.names == ["half.ckpt", "same.ckpt"]


# ---- the numbers of a category ----


def make_result(
    correct: list[float], categories: list[str], groups: list[str] | None = None
) -> Result:
    """Return a result with these cases right or wrong; by default each is its own group."""
    groups = groups or [str(i) for i in range(len(correct))]
    scores = []
    for i, (points, category, group) in enumerate(zip(correct, categories, groups, strict=True)):
        texts = dict(prompt="p", answers=("a",), distractors=("b",))
        case = Case(str(i), "choice", category, group, **texts)
        scores.append(Score(case, points, logprob=-1.0))
    return Result(["x"], 1, 1, None, "", "", scores)


def test_a_category_s_numbers_are_those_worked_by_hand():
    """Right after "a" to "i", a tie after "j", wrong after "k" and "l": 9.5 of 12; chance is 6."""
    make_checkpoint("a.ckpt", LETTER_CASES[:9], tied="j")
    [result] = evaluate_letters("a.ckpt")
    s = summarise(result, "first", 5)
    assert (s.n, s.ties, s.accuracy, s.chance) == (12, 1, 9.5 / 12, 0.5)
    assert s.centred == pytest.approx((9.5 / 12 - 0.5) / 0.5)
    assert s.interval == pytest.approx(wilson_interval(9.5, 12))
    assert s.p_correct == pytest.approx((9 * 0.75 + 0.5 + 2 * 0.25) / 12, abs=EXACT)
    assert s.p_correct_interval[0] < s.p_correct < s.p_correct_interval[1]
    assert s.margin == pytest.approx((9 - 2) * math.log(3) / 12, abs=1e-5)  # nats; float32
    brier = (9 * 2 * 0.25**2 + 2 * 0.5**2 + 2 * 2 * 0.75**2) / 12
    assert s.brier == pytest.approx(brier, abs=EXACT)
    logprob = (9 * math.log(0.6) + math.log(0.4) + 2 * math.log(0.2)) / 12
    assert s.logprob == pytest.approx(logprob, abs=1e-5)
    assert s.by == dict.fromkeys(("sum", "token", "byte", "pmi"), s.accuracy)
    both = summarise(result, None, 5)
    assert (both.n, both.accuracy) == (24, 9.5 / 24)
    assert result.macro == (9.5 / 12 + 0) / 2


def test_the_ranks_of_the_first_tokens_are_summarised():
    make_checkpoint("a.ckpt", LETTER_CASES[:9], tied="j")
    [result] = evaluate_letters("a.ckpt")
    s = summarise(result, "first", 5)
    ranks = [score.first_token_rank for score in result.graded[:12]]
    assert ranks[:9] == [1] * 9
    assert ranks[10:] == [2, 2]
    assert s.mrr == pytest.approx(sum(1 / rank for rank in ranks) / 12)
    assert s.top1 == sum(rank == 1 for rank in ranks) / 12
    assert s.topk == 1
    assert s.greedy == pytest.approx(s.top1)


def test_a_model_that_ties_everywhere_has_an_accuracy_of_chance():
    make_checkpoint("a.ckpt", "", tied=ascii_lowercase)
    [result] = evaluate_letters("a.ckpt")
    assert result.macro == 0.5
    for category in ("first", "second", None):
        s = summarise(result, category, 5)
        assert (s.ties, s.accuracy, s.chance, s.centred) == (s.n, 0.5, 0.5, 0)


def test_the_headline_s_interval_combines_those_of_the_categories():
    correct = [1.0] * 9 + [0.0] * 3 + [1.0] * 2 + [0.0] * 38
    result = make_result(correct, ["a"] * 12 + ["b"] * 40)
    assert result.macro == (9 / 12 + 2 / 40) / 2
    assert result.macro_interval == pytest.approx(mean_interval([(9, 12), (2, 40)]))


@pytest.mark.parametrize("right", [0, 3, 9, 12])
def test_cases_of_one_group_make_no_interval_narrower(right):
    """With each case four times, as with paraphrases, no interval becomes narrower."""
    names, other = [str(i) for i in range(12)], [0.0] * 10 + [1.0] * 2
    correct = [1.0] * right + [0.0] * (12 - right)
    once, fourfold = (make_result(correct * n, ["c"] * 12 * n, names * n) for n in (1, 4))
    others = (make_result(other * n, ["c"] * 12 * n, names * n) for n in (1, 4))
    interval = summarise(fourfold, "c", 1).interval
    assert interval == pytest.approx(summarise(once, "c", 1).interval)
    assert fourfold.macro_interval == pytest.approx(once.macro_interval)
    (_, one), (_, four) = (
        a.difference_from(b) for a, b in zip((once, fourfold), others, strict=True)
    )
    assert one == pytest.approx(four)
    naive = wilson_interval(4 * right, 48)
    assert naive[1] - naive[0] < 0.7 * (interval[1] - interval[0])


def test_a_category_of_cases_with_and_without_choices_has_finite_intervals():
    """Some bootstrap samples do not contain the only case with choices."""
    result = make_result([1.0] * 12, ["c"] * 12)
    case = result.scores[3].case
    comparison = Comparison(1.0, {}, tie=False, rank=1, p_correct=0.75, margin=1.0, brier=0.1)
    result.scores[3] = Score(case, 1.0, logprob=-1.0, comparison=comparison)
    assert summarise(result, "c", 1).p_correct_interval == (0.75, 0.75)


# ---- comparisons ----


def test_two_checkpoints_are_compared_case_by_case():
    """Eight of 200 cases differ, all in one direction.

    The paired interval excludes zero, though the intervals of the two accuracies overlap.
    """
    first = make_result([1.0] * 100 + [0.0] * 100, ["c"] * 200)
    second = make_result([1.0] * 92 + [0.0] * 108, ["c"] * 200)
    difference, (low, high) = first.difference_from(second)
    assert difference == pytest.approx(0.04)
    assert 0 < low < difference < high
    assert first.macro_interval[0] < second.macro_interval[1]
    widths = [high - low for low, high in (first.macro_interval, second.macro_interval)]
    assert high - low < math.hypot(*widths) / 3


def test_what_was_learned_and_forgotten_and_the_first_step_above_chance():
    """The interval of 10 of 12 is above a half, that of 9 is not.

    The first category rises above chance, falls, and rises again.
    """
    right = {
        100: LETTER_CASES[:3],
        200: LETTER_CASES[:11],
        300: LETTER_CASES[:9],
        400: LETTER_CASES[1:12] + LETTER_CASES[12:16],
        500: LETTER_CASES[:10] + LETTER_CASES[13:18],
    }
    for step, letters in right.items():
        make_checkpoint(f"step-{step}.ckpt", letters, step)
    paths = [f"step-{step}.ckpt" for step in (500, 100, 300, 200, 400)]
    results = evaluate_letters(*paths)
    assert wilson_interval(10, 12)[0] > 0.5 > wilson_interval(9, 12)[0]
    assert first_step_above_chance(results, "first") == 400
    assert first_step_above_chance(results, "second") is None
    by_step = {result.step: result for result in results}
    flips = learned_and_forgotten(by_step[400], by_step[500])
    assert flips == (["a", "q", "r"], ["k", "l", "m"])


def test_a_checkpoint_that_has_nothing_right_is_never_above_a_chance_of_zero():
    cases = [
        Case(str(i), category="c", group=str(i), prompt="p", answers=("a",)) for i in range(12)
    ]
    results = []
    for step, right in enumerate((0, 0, 1)):
        scores = [Score(case, float(i < right), logprob=-1.0) for i, case in enumerate(cases)]
        results.append(Result(["x"], step, step, None, "", "", scores))
    assert first_step_above_chance(results[:2], "c") is None
    assert first_step_above_chance(results, "c") == 2
