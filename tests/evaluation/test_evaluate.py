"""The probe evaluator as a program: what is ranked, what is called best, what is printed and written, and its exit status.

Its checkpoints are models of which each next letter's probability is known, so that who knows which case is chosen here.
"""

import csv
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest
import torch

import evaluate_checkpoints
from pocketlm.checkpoint.format import save_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import UserError, run_main
from pocketlm.evaluation import exports, tables
from pocketlm.evaluation.cases import Case, load_suite
from pocketlm.evaluation.results import (
    Result,
    evaluate,
    first_step_above_chance,
    learned_and_forgotten,
    summarise,
)
from pocketlm.evaluation.scoring import Score, encode_case, score_cases
from pocketlm.evaluation.statistics import DRAWS, SEED, mean_of_proportions, wilson
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.bigrams import BIGRAM, LETTERS, bigram, make_checkpoint, save, table

ROOT = Path(__file__).parents[2]
EXACT = 1e-6  # float32 log-probabilities of one letter, made into a probability
ASKED = ascii_lowercase[:24]  # a case each: is "A" likelier than "B" behind it?
SUITE = (
    "schema: 1\nname: letters\ndefaults: {type: choice, joined: true, echo: true}\ncases:\n"
    + "".join(
        f"- {{id: {x}, category: {'first' if x < 'm' else 'second'}, prompt: {x}, answers: [A], distractors: [B]}}\n"
        for x in ASKED
    )
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty one to be in, with the suite."""
    monkeypatch.chdir(tmp_path)
    Path("cases.yaml").write_text(SUITE)
    return tmp_path


def said(capsys) -> str:
    """What was printed, without line breaks and the like."""
    return " ".join(capsys.readouterr().out.split())


def run_json(capsys, *arguments: str) -> dict:
    assert evaluate_checkpoints.main(["--cases", "cases.yaml", "--json", *arguments]) == 0
    return json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )


# ---- what is ranked ----


def test_the_better_checkpoint_stands_first_and_copies_of_the_same_weights_are_shown_once(capsys):
    make_checkpoint("checkpoints/step-1.ckpt", ASKED[:6])
    shutil.copy("checkpoints/step-1.ckpt", "checkpoints/last.ckpt")
    make_checkpoint(
        "checkpoints/elsewhere.ckpt", ASKED[:6], step=2
    )  # another file with the same weights
    make_checkpoint("checkpoints/trained.ckpt", ASKED[:20])
    report = run_json(capsys)
    assert [r["names"] for r in report["checkpoints"]] == [
        ["checkpoints/trained.ckpt"],
        ["checkpoints/elsewhere.ckpt", "checkpoints/last.ckpt", "checkpoints/step-1.ckpt"],
    ]
    assert [r["macro"]["accuracy"] for r in report["checkpoints"]] == [(1 + 8 / 12) / 2, 6 / 12 / 2]
    assert evaluate_checkpoints.main(["--cases", "cases.yaml", "--top-k", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("trained.ckpt") < shown.index("elsewhere.ckpt")
    assert "= checkpoints/last.ckpt" in shown
    assert "top 3 next tokens" in shown


def test_a_file_named_twice_is_scored_once(capsys):
    make_checkpoint("a.ckpt", "abc")
    report = run_json(capsys, "--checkpoints", "a.ckpt", "*.ckpt", "a.ckpt")
    assert [r["names"] for r in report["checkpoints"]] == [["a.ckpt"]]


def test_the_same_weights_with_another_tokenizer_are_another_model(capsys):
    """Where "A" and "B" change places, all that was right is wrong."""
    make_checkpoint("a.ckpt", ASKED)
    shutil.copy("a.ckpt", "b.ckpt")
    swapped = CharTokenizer("BA" + ascii_lowercase)
    state = torch.load("b.ckpt", weights_only=True)
    save_checkpoint(state | {"kit": state["kit"] | {"tokenizer": swapped.state()}}, Path("b.ckpt"))
    first, second = run_json(capsys, "--checkpoints", "b.ckpt", "a.ckpt")["checkpoints"]
    assert first["weights_sha256"] == second["weights_sha256"]
    assert (first["names"], first["tokenizer_sha256"], first["macro"]["accuracy"]) == (
        ["a.ckpt"],
        LETTERS.fingerprint,
        1,
    )
    assert (second["names"], second["tokenizer_sha256"], second["macro"]["accuracy"]) == (
        ["b.ckpt"],
        swapped.fingerprint,
        0,
    )


def test_checkpoints_of_other_vocabularies_are_each_asked_in_their_own_tokens(capsys):
    make_checkpoint("char.ckpt", ASKED[:7])
    make_checkpoint(
        "more.ckpt",
        ASKED[:9],
        tokenizer=CharTokenizer("".join(reversed("?!AB" + ascii_lowercase)), bos=True),
    )
    report = run_json(capsys, "--checkpoints", "*.ckpt")["checkpoints"]
    assert [[s["id"] for s in r["scores"] if s["correct"]] for r in report] == [
        list(ASKED[:9]),
        list(ASKED[:7]),
    ]
    for r in report:
        for score in r["scores"]:
            assert score["logprob"] == pytest.approx(
                math.log(0.6 if score["correct"] else 0.2), abs=EXACT
            )
    suite = load_suite("cases.yaml")
    alone = evaluate(["char.ckpt"], suite)[0]
    assert alone.scores == evaluate(["more.ckpt", "char.ckpt"], suite)[1].scores
    with pytest.raises(UserError, match="was trained with the tokenizer 'char', not 'byte'"):
        evaluate(["char.ckpt"], suite, "byte")


def test_equal_accuracy_is_ranked_by_the_log_probability_of_what_is_right_and_texts_by_bits_per_byte(
    capsys,
):
    make_checkpoint("b.ckpt", ASKED[:8], tied="x")
    make_checkpoint("a.ckpt", ASKED[:8], tied="y")
    for name, p in (("d", 0.3), ("c", 0.25)):  # behind "z" comes "z", of which the text is made
        save(
            f"{name}.ckpt",
            bigram(table(LETTERS, {"z": {"z": p}, "a": {"A": p, "B": 0.1}})),
            LETTERS,
            **BIGRAM,
        )
    Path("text.yaml").write_text("schema: 1\ncases: [{id: t, type: text, text: zzzzz}]")
    suite = load_suite("text.yaml")
    assert [r.names for r in evaluate(["c.ckpt", "d.ckpt"], suite)] == [["d.ckpt"], ["c.ckpt"]]
    Path("one.yaml").write_text(
        "schema: 1\ncases: [{id: t, type: choice, prompt: a, answers: [A], distractors: [B]}]"
    )
    assert [r.names for r in evaluate(["c.ckpt", "d.ckpt"], load_suite("one.yaml"))] == [
        ["d.ckpt"],
        ["c.ckpt"],
    ]
    assert (
        evaluate_checkpoints.main(["--cases", "text.yaml", "--checkpoints", "c.ckpt", "d.ckpt"])
        == 0
    )  # nothing right or wrong to put in a table
    shown = said(capsys)
    assert (
        f"{-math.log2(1 / 30) / 5 - 4 / 5 * math.log2(0.3):.4f} bits per byte over 5 bytes" in shown
    )
    assert "accuracy is the mean" in shown


def test_by_default_the_unnamed_run_is_scored_and_else_the_best_named_one(capsys):
    make_checkpoint("checkpoints/one/best.ckpt", "abc")
    make_checkpoint("checkpoints/one/step-00000001.ckpt", "ab")
    assert [r["names"] for r in run_json(capsys)["checkpoints"]] == [
        ["checkpoints/one/best.ckpt"],
        ["checkpoints/one/step-00000001.ckpt"],
    ]
    assert evaluate_checkpoints.main(["--cases", "cases.yaml"]) == 0
    assert "scoring checkpoints/one/*.ckpt" in capsys.readouterr().err
    make_checkpoint("checkpoints/last.ckpt", "a")
    assert [r["names"] for r in run_json(capsys)["checkpoints"]] == [["checkpoints/last.ckpt"]]


def test_dropout_is_off(capsys):
    """With half of all numbers dropped, no two passes would agree, and none with the probabilities that are known."""
    make_checkpoint("a.ckpt", ASKED[:6], dropout=0.5)
    first, second = (run_json(capsys, "--checkpoints", "a.ckpt") for _ in range(2))
    assert first == second
    for score in first["checkpoints"][0]["scores"]:
        assert score["p_correct"] == pytest.approx(0.75 if score["correct"] else 0.25, abs=EXACT)
    checkpoint = load_checkpoint("a.ckpt")
    encoded = [encode_case(LETTERS, case, 16) for case in load_suite("cases.yaml").cases]
    training = score_cases(checkpoint.model.train(), LETTERS, encoded)
    assert (
        max(
            abs(a.p_correct - b["p_correct"])
            for a, b in zip(training, first["checkpoints"][0]["scores"], strict=True)
        )
        > 0.1
    )


def test_weights_kept_in_bfloat16_are_computed_with_in_float32():
    model = bigram(table(LETTERS, {x: {"A": 0.6, "B": 0.2} for x in ASKED})).bfloat16()
    save("half.ckpt", model, LETTERS, **BIGRAM)
    save("same.ckpt", model.float(), LETTERS, **BIGRAM)
    [both] = evaluate(["half.ckpt", "same.ckpt"], load_suite("cases.yaml"))
    assert both.names == ["half.ckpt", "same.ckpt"]


# ---- what is said of a checkpoint ----


def by_hand(
    outcomes: list[float], categories: list[str], groups: list[str] | None = None, **more
) -> Result:
    """A result with these cases right or wrong."""
    groups = groups or [str(i) for i in range(len(outcomes))]
    cases = [
        Case(str(i), "choice", c, g, prompt="p", answers=("a",), distractors=("b",))
        for i, (c, g) in enumerate(zip(categories, groups, strict=True))
    ]
    scores = [
        Score(case, correct, logprob=-1.0) for case, correct in zip(cases, outcomes, strict=True)
    ]
    return Result(
        **dict(
            names=["x"],
            step=1,
            tokens=1,
            val_loss=None,
            weights_sha256="",
            tokenizer_sha256="",
            scores=scores,
        )
        | more
    )


def test_a_category_s_numbers_are_those_worked_by_hand():
    """Behind "a" to "i" right, "j" tied, "k" and "l" wrong: 9.5 of 12, where guessing has 6."""
    make_checkpoint("a.ckpt", ASKED[:9], tied="j")
    [result] = evaluate(["a.ckpt"], load_suite("cases.yaml"))
    s = summarise(result, "first", 5)
    assert (s.n, s.ties, s.accuracy, s.chance, s.centred) == (
        12,
        1,
        9.5 / 12,
        0.5,
        pytest.approx((9.5 / 12 - 0.5) / 0.5),
    )
    assert s.interval == pytest.approx(wilson(9.5, 12))
    assert s.p_correct == pytest.approx((9 * 0.75 + 0.5 + 2 * 0.25) / 12, abs=EXACT)
    assert s.p_correct_interval[0] < s.p_correct < s.p_correct_interval[1]
    assert s.margin == pytest.approx((9 - 2) * math.log(3) / 12, abs=1e-5)  # nats; float32
    assert s.brier == pytest.approx(
        (9 * 2 * 0.25**2 + 2 * 0.5**2 + 2 * 2 * 0.75**2) / 12, abs=EXACT
    )
    assert s.logprob == pytest.approx(
        (9 * math.log(0.6) + math.log(0.4) + 2 * math.log(0.2)) / 12, abs=1e-5
    )
    ranks = [s.first_token_rank for s in result.graded[:12]]
    assert ranks[:9] == [1] * 9 and ranks[10:] == [2, 2]
    assert s.mrr == pytest.approx(sum(1 / rank for rank in ranks) / 12)
    assert s.top1 == sum(rank == 1 for rank in ranks) / 12
    assert s.topk == 1
    assert s.greedy == pytest.approx(s.top1)
    assert s.by == {"sum": s.accuracy, "token": s.accuracy, "byte": s.accuracy, "pmi": s.accuracy}
    both = summarise(result, None, 5)
    assert (both.n, both.accuracy) == (24, 9.5 / 24)
    assert result.macro == (9.5 / 12 + 0) / 2


def test_a_model_that_ties_everywhere_is_worth_nothing_above_chance(capsys):
    make_checkpoint("a.ckpt", "", tied=ascii_lowercase)
    report = run_json(capsys, "--checkpoints", "a.ckpt")["checkpoints"][0]
    assert report["macro"]["accuracy"] == 0.5
    for category in report["categories"].values():
        assert (
            category["ties"],
            category["accuracy"],
            category["chance"],
            category["centred"],
        ) == (category["n"], 0.5, 0.5, 0)
    assert evaluate_checkpoints.main(["--cases", "cases.yaml", "--checkpoints", "a.ckpt"]) == 0
    assert "24 ties" in said(capsys)


def test_the_headline_s_interval_is_made_of_those_of_the_categories():
    result = by_hand([1.0] * 9 + [0.0] * 3 + [1.0] * 2 + [0.0] * 38, ["a"] * 12 + ["b"] * 40)
    assert result.macro == (9 / 12 + 2 / 40) / 2
    assert result.macro_interval == pytest.approx(mean_of_proportions([(9, 12), (2, 40)]))


@pytest.mark.parametrize("right", [0, 3, 9, 12])
def test_cases_of_one_group_make_no_interval_narrower(right):
    """Each case four times, as paraphrases would be: accuracy, headline and the paired difference are as unsure as before."""
    outcomes, others = [1.0] * right + [0.0] * (12 - right), [0.0] * 10 + [1.0] * 2
    names = [str(i) for i in range(12)]
    once, fourfold = (
        by_hand(outcomes, ["c"] * 12, names),
        by_hand(outcomes * 4, ["c"] * 48, names * 4),
    )
    assert summarise(fourfold, "c", 1).interval == pytest.approx(summarise(once, "c", 1).interval)
    assert fourfold.macro_interval == pytest.approx(once.macro_interval)
    pairs = (
        once.difference_from(by_hand(others, ["c"] * 12, names)),
        fourfold.difference_from(by_hand(others * 4, ["c"] * 48, names * 4)),
    )
    assert pairs[0][1] == pytest.approx(pairs[1][1])
    naive = wilson(4 * right, 48)
    interval = summarise(fourfold, "c", 1).interval
    assert naive[1] - naive[0] < 0.7 * (interval[1] - interval[0])


def test_a_category_of_cases_with_and_without_choices_has_finite_intervals():
    """Some draws have none of the one case with choices."""
    result = by_hand([1.0] * 12, ["c"] * 12)
    result.scores[:] = [
        Score(s.case, 1.0, p_correct=0.75 if i == 3 else None, logprob=-1.0)
        for i, s in enumerate(result.scores)
    ]
    assert summarise(result, "c", 1).p_correct_interval == (0.75, 0.75)


def test_two_checkpoints_are_compared_case_by_case(capsys):
    """Of 200 cases 8 differ, all to one side: best, though the two intervals by themselves overlap by far."""
    first, second = (
        by_hand([1.0] * 100 + [0.0] * 100, ["c"] * 200),
        by_hand([1.0] * 92 + [0.0] * 108, ["c"] * 200),
    )
    apart, (low, high) = first.difference_from(second)
    assert apart == pytest.approx(0.04)
    assert 0 < low < apart < high
    assert first.macro_interval[0] < second.macro_interval[1]
    widths = [b - a for a, b in (first.macro_interval, second.macro_interval)]
    assert high - low < math.hypot(*widths) / 3
    assert tables.verdict([first, second]).startswith("best: x, ahead of x by 4.0%")
    assert "8 cases won, 0 lost, McNemar p = 0.00781" in tables.verdict([first, second])


def test_best_is_said_only_where_the_paired_intervals_exclude_zero(capsys):
    make_checkpoint("good.ckpt", ASKED)
    make_checkpoint("near.ckpt", ASKED[1:])
    make_checkpoint("far.ckpt", ASKED[:3])
    assert (
        evaluate_checkpoints.main(
            ["--cases", "cases.yaml", "--checkpoints", "good.ckpt", "far.ckpt"]
        )
        == 0
    )
    shown = said(capsys)
    assert "best: good.ckpt, ahead of far.ckpt by 87.5%" in shown
    assert "21 cases won, 0 lost" in shown
    assert (
        evaluate_checkpoints.main(
            ["--cases", "cases.yaml", "--checkpoints", "good.ckpt", "near.ckpt", "far.ckpt"]
        )
        == 0
    )
    shown = said(capsys)
    assert "good.ckpt is tied with near.ckpt (behind by 4.2% [0.0%," in shown
    assert "best:" not in shown
    assert "tied with far" not in shown


def test_no_column_is_cut_where_all_have_something_to_say(capsys):
    make_checkpoint("checkpoints/step-00001000.ckpt", ASKED[:9], tied="j", step=1000)
    make_checkpoint("checkpoints/step-00002000.ckpt", ASKED[:9], step=2000)
    Path("more.yaml").write_text(
        "schema: 1\ncases: [{id: text, type: text, text: zzzzz}, {id: made, type: generate, prompt: a, match: A}, "
        "{id: pair, type: minimal_pair, good: aA, bad: aB}, {id: open, prompt: b, answers: [A], joined: true}, "
        "{id: which, type: schema, contexts: [x, a], continuation: A, gold: 1, joined: true}]"
    )
    assert (
        evaluate_checkpoints.main(
            ["--cases", "cases.yaml", "more.yaml", "--baseline", "checkpoints/step-00001000.ckpt"]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert "…" not in captured.out
    said = "has 4 cases; of fewer than 10 no interval says anything (1 of 1 remarks; --validate-only has them all)"
    assert said in captured.err
    Path("wide.yaml").write_text(
        SUITE.replace("category: first", "category: $").replace("category: second", "category: $")
    )
    for x in ASKED:
        Path("wide.yaml").write_text(
            Path("wide.yaml").read_text().replace("$", f"a category of {x}", 1)
        )
    assert (
        evaluate_checkpoints.main(
            ["--cases", "wide.yaml", "--baseline", "checkpoints/step-00001000.ckpt"]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert all(
        shown.count(f"a category of {x}") == 4 for x in ASKED
    )  # twice by category, over training, against the baseline


# ---- numbers that are not finite ----


def test_a_checkpoint_with_broken_weights_is_named_and_not_ranked_and_the_status_is_1(capsys):
    make_checkpoint("good.ckpt", ASKED[:3])
    make_checkpoint("broken.ckpt", ASKED, broken=True)
    for form in ([], ["--json"], ["--csv"], ["--markdown"]):
        assert (
            evaluate_checkpoints.main(
                ["--cases", "cases.yaml", "--checkpoints", "broken.ckpt", "good.ckpt", *form]
            )
            == 1
        )
        captured = capsys.readouterr()
        assert "not ranked, as log-probabilities are not finite: broken.ckpt" in captured.err
        assert "broken.ckpt" not in captured.out
        assert "good.ckpt" in captured.out
    with pytest.raises(
        UserError,
        match="broken.ckpt: the log-probabilities are not finite, so the weights are broken; nothing to rank",
    ):
        evaluate_checkpoints.main(["--cases", "cases.yaml", "--checkpoints", "broken.ckpt"])
    with pytest.raises(
        UserError, match="--baseline broken.ckpt: the log-probabilities are not finite"
    ):
        evaluate_checkpoints.main(
            ["--cases", "cases.yaml", "--checkpoints", "good.ckpt", "--baseline", "broken.ckpt"]
        )


# ---- thresholds ----


def test_the_status_is_3_where_an_accuracy_lies_below_what_was_asked(capsys):
    make_checkpoint("a.ckpt", ASKED[:15])  # 12 of 12, and 3 of 12
    make_checkpoint("b.ckpt", "")
    command = ["--cases", "cases.yaml", "--checkpoints", "b.ckpt", "a.ckpt", "--csv"]
    reached = ["first=1", "second=0.25", "macro=0.625", "micro=0.625"]
    assert (
        evaluate_checkpoints.main(
            command + [part for each in reached for part in ("--fail-under", each)]
        )
        == 0
    )
    for name, least, value in [
        ("first", "1.0", None),
        ("second", "0.26", "0.250"),
        ("macro", "0.63", "0.625"),
        ("micro", "0.7", "0.625"),
    ]:
        capsys.readouterr()
        assert evaluate_checkpoints.main([*command, "--fail-under", f"{name}={least}"]) == (
            evaluate_checkpoints.FAILED if value else 0
        )
        if value:
            assert f"a.ckpt: {name} is {value}, below {least}" in capsys.readouterr().err
    for wrong, message in [
        ("third=0.5", "there is no category 'third'; there are macro, micro, first, second"),
        ("first", "write CATEGORY=SCORE, for example second=0.5"),
        ("first=high", "write CATEGORY=SCORE"),
        ("first=", "write CATEGORY=SCORE"),
        ("=0.5", "there is no category ''"),
        ("first=60", "an accuracy lies from 0 to 1"),
        ("first=nan", "an accuracy lies from 0 to 1"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate_checkpoints.main([*command, "--fail-under", wrong])
    Path("text.yaml").write_text("schema: 1\ncases: [{id: t, type: text, text: zzzzz}]")
    with pytest.raises(UserError, match="--fail-under looks at accuracies, and a text has none"):
        evaluate_checkpoints.main(
            ["--cases", "text.yaml", "--checkpoints", "a.ckpt", "--fail-under", "macro=0.5"]
        )


# ---- over training ----


def test_what_was_learned_and_forgotten_and_since_when_a_category_lies_above_chance(capsys):
    """10 of 12 lie above a half, whose interval begins at 55 %, and 9 do not. The first category gets there, falls, and returns."""
    known = {
        100: ASKED[:3],
        200: ASKED[:11],
        300: ASKED[:9],
        400: ASKED[1:12] + ASKED[12:16],
        500: ASKED[:10] + ASKED[13:18],
    }
    for step, right in known.items():
        make_checkpoint(f"checkpoints/step-{step}.ckpt", right, step)
    results = evaluate(
        [f"checkpoints/step-{step}.ckpt" for step in (500, 100, 300, 200, 400)],
        load_suite("cases.yaml"),
    )
    assert wilson(10, 12)[0] > 0.5 > wilson(9, 12)[0]
    assert (
        first_step_above_chance(results, "first"),
        first_step_above_chance(results, "second"),
    ) == (400, None)
    before, after = (next(r for r in results if r.step == step) for step in (400, 500))
    assert learned_and_forgotten(before, after) == (["a", "q", "r"], ["k", "l", "m"])
    assert evaluate_checkpoints.main(["--cases", "cases.yaml"]) == 0
    shown = said(capsys)
    assert "learned from step 400 to 500: 3 (a, q, r)" in shown
    assert "forgotten from step 400 to 500: 3 (k, l, m)" in shown
    # the ranks of 3, 11, 9, 11, 10 right are 1, 4.5, 2, 4.5, 3; those of 0, 0, 0, 4, 5 are 2, 2, 2, 4, 5; macro: 1, 3, 2, 4.5, 4.5
    expected = [
        np.corrcoef(range(5), ranks)[0, 1]
        for ranks in ([1, 3, 2, 4.5, 4.5], [1, 4.5, 2, 4.5, 3], [2, 2, 2, 4, 5])
    ]
    assert "rank correlation with step " + " ".join(f"{x:+.2f}" for x in expected) in shown
    assert "above chance from step 400 never" in shown


def test_a_checkpoint_that_has_nothing_right_is_never_above_chance():
    cases = [
        Case(str(i), category="c", group=str(i), prompt="p", answers=("a",)) for i in range(12)
    ]  # of which guessing has none
    results = []
    for step, right in enumerate((0, 0, 1)):
        scores = [Score(case, float(i < right), logprob=-1.0) for i, case in enumerate(cases)]
        results.append(Result(["x"], step, step, None, "", "", scores))
    assert first_step_above_chance(results[:2], "c") is None
    assert first_step_above_chance(results, "c") == 2


def test_against_a_baseline_the_differences_are_paired_category_by_category(capsys):
    """+8 of 12 and -1 of 12: a star stands at the one that the paired interval tells from zero."""
    make_checkpoint("base.ckpt", ASKED[:3] + ASKED[12:14])
    make_checkpoint("new.ckpt", ASKED[:11] + ASKED[13:14])
    assert (
        evaluate_checkpoints.main(
            ["--cases", "cases.yaml", "--checkpoints", "new.ckpt", "--baseline", "base.ckpt"]
        )
        == 0
    )
    shown = said(capsys)
    assert "against base.ckpt; * is a paired interval that excludes zero" in shown
    row = shown.split("against base.ckpt")[1].split("new.ckpt")[1]
    assert row.split()[0] == f"{(8 - 1) / 24:+.1%}"
    assert row.endswith("] 8 1 0.0391 +66.7%* -8.3%")  # 2 (1 + 9) / 2^9
    pair = run_json(capsys, "--checkpoints", "new.ckpt", "--baseline", "base.ckpt")["comparisons"][
        0
    ]
    assert (pair["first"], pair["second"], pair["mcnemar"]["won"], pair["mcnemar"]["lost"]) == (
        "new.ckpt",
        "base.ckpt",
        8,
        1,
    )
    assert pair["mcnemar"]["p"] == 2 * 10 / 2**9
    assert pair["difference"] == pytest.approx(7 / 24)
    assert 0 < pair["interval"][0] < 7 / 24 < pair["interval"][1]


# ---- forms ----

MIXED = (
    "schema: 1\nname: mixed\ncases:\n"
    '- {id: pair, type: minimal_pair, good: "aA", bad: "aB"}\n'
    '- {id: open, prompt: "b", answers: ["A"], joined: true, group: "g, 1"}\n'
    "- {id: text, type: text, text: zzzz}\n"
    "- {id: made, type: generate, prompt: c, match: A, max_new_tokens: 3}\n"
    "- {id: tied, type: choice, joined: true, prompt: x, answers: [A], distractors: [B]}\n"
)


@pytest.fixture
def mixed() -> list[str]:
    """Every type of case, two checkpoints, and the arguments that ask for them."""
    Path("mixed.yaml").write_text(MIXED)
    make_checkpoint("checkpoints/a.ckpt", "ab", step=100, tied="x")
    make_checkpoint("checkpoints/b.ckpt", "c", step=200, tied="x")
    return ["--cases", "mixed.yaml"]


def test_json_says_what_was_asked_of_what_and_with_what(mixed, capsys):
    assert evaluate_checkpoints.main([*mixed, "--json", "--top-k", "3"]) == 0
    report = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    suite = load_suite("mixed.yaml")
    assert report["schema"] == 2
    assert report["suite"] == {"name": "mixed", "sha256": suite.sha256, "cases": 5, "skipped": 0}
    made_with = report["made_with"]
    assert (made_with["bootstrap_draws"], made_with["bootstrap_seed"], made_with["top_k"]) == (
        DRAWS,
        SEED,
        3,
    )
    assert (made_with["torch"], made_with["dtype"], made_with["device"]) == (
        torch.__version__,
        "float32",
        "cpu",
    )
    assert report["cases"][0] == {
        "id": "pair", "type": "minimal_pair", "category": "mixed", "group": "pair", "scoring": "sum", "good": "aA", "bad": "aB",
        "max_new_tokens": 20,
    }  # fmt: skip
    first, second = report["checkpoints"]
    assert (first["names"], first["step"], first["tokens"], first["val_loss"]) == (
        ["checkpoints/a.ckpt"],
        100,
        1000,
        2.0,
    )
    assert (
        first["weights_sha256"]
        == load_checkpoint("checkpoints/a.ckpt").weights_sha256
        != second["weights_sha256"]
    )
    assert first["tokenizer_sha256"] == LETTERS.fingerprint
    assert list(first["categories"]) == ["mixed", "micro"]
    scores = {score["id"]: score for score in first["scores"]}
    assert [scores[name]["correct"] for name in ("pair", "open", "text", "made", "tied")] == [
        1,
        1,
        None,
        0,
        0.5,
    ]
    assert (first["macro"]["accuracy"], second["macro"]["accuracy"]) == (2.5 / 4, 1.5 / 4)
    assert scores["pair"]["logprob"] == pytest.approx(
        math.log(0.6 / 30), abs=1e-5
    )  # behind the begin, all 30 are alike
    assert [len(scores["open"]["top"]), scores["open"]["top"][0]] == [
        3,
        ["A", pytest.approx(0.6, abs=EXACT)],
    ]
    assert scores["made"]["generated"].startswith("B")
    [pair] = report["comparisons"]
    assert (pair["first"], pair["second"]) == ("checkpoints/a.ckpt", "checkpoints/b.ckpt")
    assert pair["difference"] == pytest.approx(0.25)
    assert pair["mcnemar"] == {"won": 2, "lost": 1, "p": 1.0}


def test_csv_has_a_row_for_each_checkpoint_and_case_with_the_numbers_of_the_json(mixed, capsys):
    assert evaluate_checkpoints.main([*mixed, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert evaluate_checkpoints.main([*mixed, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 2 * 5
    pairs = [
        (r, score, case)
        for r in report["checkpoints"]
        for score, case in zip(r["scores"], report["cases"], strict=True)
    ]
    for row, (r, score, case) in zip(rows, pairs, strict=True):
        assert (row["checkpoint"], row["step"], row["trained_tokens"]) == (
            r["names"][0],
            str(r["step"]),
            str(r["tokens"]),
        )
        assert [row[key] for key in ("case", "type", "category", "group")] == [
            case[key] for key in ("id", "type", "category", "group")
        ]
        for name in exports.CSV_FIELDS:
            if isinstance(score[name], int | float):
                assert float(row[name]) == pytest.approx(float(score[name]), rel=1e-5), (
                    name
                )  # six digits
            else:
                assert row[name] == (score[name] or "")


def test_markdown_has_a_row_for_each_checkpoint_and_a_column_for_each_category(capsys):
    make_checkpoint("a.ckpt", ASKED[:15])
    make_checkpoint("b.ckpt", "", step=1000)
    assert (
        evaluate_checkpoints.main(
            ["--cases", "cases.yaml", "--checkpoints", "a.ckpt", "b.ckpt", "--markdown"]
        )
        == 0
    )
    low, high = mean_of_proportions([(12, 12), (3, 12)])
    ranges = [f"{100 * a:.1f}%, {100 * b:.1f}%" for a, b in (wilson(12, 12), wilson(3, 12))]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "| checkpoint | step | accuracy | first | second |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| a.ckpt | 1 | **62.5%** [{low:.1%}, {high:.1%}] | 100.0% [{ranges[0]}] | 25.0% [{ranges[1]}] |",
    ]
    assert lines[3].startswith("| b.ckpt | 1,000 | **0.0%** [0.0%, ")
    assert lines[4] == "| guessing | | | 50.0% | 50.0% |"


def test_the_picture_is_written_and_its_size_is_as_said(mixed, capsys):
    from matplotlib import image

    assert evaluate_checkpoints.main([*mixed, "--plot", "new/probes.png", "--csv"]) == 0
    assert "picture: new/probes.png" in capsys.readouterr().err
    picture = image.imread("new/probes.png")
    panels = 1 + len(
        {case.category for case in load_suite("mixed.yaml").cases if case.type != "text"}
    )
    columns, rows = min(5, panels), math.ceil(panels / 5)
    assert picture.shape[:2] == (
        round((1.9 * rows + 0.4) * 120),
        round((2.2 * columns + 0.4) * 120),
    )  # 120 dots an inch
    assert picture.std() > 0.05  # not an empty sheet
    with pytest.raises(UserError, match="--plot probes.doc: "):
        evaluate_checkpoints.main([*mixed, "--plot", "probes.doc", "--csv"])


def test_tensorboard_reads_the_accuracies_back_at_their_steps(mixed, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert evaluate_checkpoints.main([*mixed, "--tensorboard", "logs", "--csv"]) == 0
    assert "tensorboard --logdir logs" in capsys.readouterr().err
    events = EventAccumulator("logs").Reload()
    results = sorted(
        evaluate(["checkpoints/a.ckpt", "checkpoints/b.ckpt"], load_suite("mixed.yaml")),
        key=lambda r: r.step,
    )
    expected = {
        "probe/macro": [r.macro for r in results],
        "probe/mixed/accuracy": [r.macro for r in results],
        "probe/mixed/p_correct": [summarise(r, "mixed", 5).p_correct for r in results],
        "probe/bits_per_byte": [r.scores[2].bits_per_byte for r in results],
    }
    assert sorted(events.Tags()["scalars"]) == sorted(expected)
    for name, numbers in expected.items():
        found = events.Scalars(name)
        assert [e.step for e in found] == [100, 200]
        assert [e.value for e in found] == pytest.approx(
            numbers, rel=1e-6
        )  # TensorBoard keeps float32


# ---- the command line ----


def test_mistakes_on_the_command_line_get_one_sentence_and_status_2(monkeypatch, capsys):
    make_checkpoint("checkpoints/a.ckpt", "abc")
    make_checkpoint("broken/b.ckpt", "abc", broken=True)
    Path("broken/c.ckpt").write_text("not a checkpoint")
    Path("again.yaml").write_text("- {name: a, prompt: other, target: A}")
    Path("long.yaml").write_text(f"- {{name: long, prompt: {'a' * 20}, target: A}}")
    cases = ["--cases", "cases.yaml"]
    for arguments, message in [
        ([], "there is nothing to ask; give --cases FILE"),
        (
            [*cases, "--checkpoints", "none/*.ckpt"],
            "no checkpoint matches 'none/*.ckpt'; here are checkpoints/a.ckpt",
        ),
        (["--cases", "missing.yaml"], "no suite matches 'missing.yaml'"),
        (
            ["--blimp", "missing.zip"],
            "--blimp missing.zip is not a folder or a zip file that can be read",
        ),
        ([*cases, "again.yaml"], "again.yaml:1: the id of 'a' stands already at cases.yaml:5"),
        ([*cases, "--tokenizer", "byte"], "was trained with the tokenizer 'char'"),
        ([*cases, "--top-k", "0"], "--top-k is 0"),
        ([*cases, "--checkpoints", "broken/b.ckpt"], "not finite"),
        (
            [*cases, "--checkpoints", "broken/c.ckpt"],
            "broken/c.ckpt is truncated or not a checkpoint",
        ),
        ([*cases, "--baseline", "none.ckpt"], "there is no checkpoint none.ckpt"),
        ([*cases, "--fail-under", "third=1"], "there is no category 'third'"),
        ([*cases, "--tensorboard", "cases.yaml", "--csv"], "cases.yaml"),
        (["--cases", "long.yaml"], "the case 'long' has 22 tokens and the model a context of 16"),
        ([*cases, "--json", "--csv"], "not allowed with argument"),
    ]:
        monkeypatch.setattr(sys, "argv", ["evaluate_checkpoints.py", *arguments])
        with pytest.raises(SystemExit) as end:
            run_main(evaluate_checkpoints.main)
        captured = capsys.readouterr()
        assert end.value.code == 2, arguments
        assert message in captured.err, arguments
        assert captured.err.count("error: ") == 1


def test_the_program_ends_with_its_status(folder):
    make_checkpoint("checkpoints/a.ckpt", "abc")
    command = [sys.executable, ROOT / "evaluate_checkpoints.py", "--cases"]
    for more, status in [
        (["cases.yaml", "--validate-only"], 0),
        (["none.yaml"], 2),
        (["cases.yaml", "--fail-under", "first=0.9"], 3),
    ]:
        done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=folder)
        assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
