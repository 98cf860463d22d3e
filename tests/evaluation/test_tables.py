"""Tables for a terminal: the verdict, no cut column, and comparisons over training and in pairs."""

from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest

import evaluate_checkpoints
from pocketlm.evaluation.tables import Column, cells_of
from tests.support.bigrams import make_checkpoint
from tests.support.probes import LETTER_CASES, LETTER_SUITE


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, which holds only the suite."""
    monkeypatch.chdir(tmp_path)
    Path("cases.yaml").write_text(LETTER_SUITE)
    return tmp_path


def tables(capsys, *arguments: str, suites: tuple[str, ...] = ("cases.yaml",)) -> str:
    """Run the command; return what it prints, with single spaces instead of white space."""
    assert evaluate_checkpoints.main(["--cases", *suites, *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_column_formats_a_value_and_shows_none_as_an_empty_cell():
    columns = [Column("text", lambda row: row[0]), Column("share", lambda row: row[1], ".1%")]
    assert cells_of(columns, [("a", 0.5), ("b", None)]) == [["a", "50.0%"], ["b", ""]]


def test_copies_of_the_same_weights_share_a_row(capsys):
    make_checkpoint("a.ckpt", LETTER_CASES[:6])
    make_checkpoint("b.ckpt", LETTER_CASES[:6], step=2)
    make_checkpoint("best.ckpt", LETTER_CASES[:20])
    checkpoints = ["a.ckpt", "b.ckpt", "best.ckpt"]
    shown = tables(capsys, "--checkpoints", *checkpoints, "--top-k", "3")
    assert shown.index("best.ckpt") < shown.index("a.ckpt")
    assert "= b.ckpt" in shown
    assert "top 3 next tokens" in shown


def test_best_is_said_if_all_paired_intervals_exclude_zero(capsys):
    make_checkpoint("good.ckpt", LETTER_CASES)
    make_checkpoint("far.ckpt", LETTER_CASES[:3])
    shown = tables(capsys, "--checkpoints", "good.ckpt", "far.ckpt")
    assert "best: good.ckpt, ahead of far.ckpt by 87.5%" in shown
    assert "21 cases won, 0 lost, McNemar p = 9.54e-07" in shown


def test_checkpoints_are_tied_if_a_paired_interval_includes_zero(capsys):
    make_checkpoint("good.ckpt", LETTER_CASES)
    make_checkpoint("near.ckpt", LETTER_CASES[1:])
    make_checkpoint("far.ckpt", LETTER_CASES[:3])
    shown = tables(capsys, "--checkpoints", "good.ckpt", "near.ckpt", "far.ckpt")
    assert "good.ckpt is tied with near.ckpt (behind by 4.2% [0.0%," in shown
    assert "the paired 95 % interval includes zero" in shown
    assert "best:" not in shown
    assert "tied with far" not in shown


def test_ties_are_counted(capsys):
    make_checkpoint("a.ckpt", "", tied=ascii_lowercase)
    assert "24 ties" in tables(capsys, "--checkpoints", "a.ckpt")


def test_a_suite_of_texts_has_a_ranking_without_accuracies(capsys):
    make_checkpoint("a.ckpt", "")
    Path("text.yaml").write_text("schema: 1\ncases: [{id: t, type: text, text: zzzzz}]")
    shown = tables(capsys, "--checkpoints", "a.ckpt", suites=("text.yaml",))
    # of 30 tokens, "A" and "B" share 0.8 after "z"; the other 28 share the rest
    bits = (np.log2(30) + 4 * np.log2(28 / 0.2)) / 5
    assert f"{bits:.4f} bits per byte over 5 bytes" in shown
    assert "accuracy is the mean over categories" in shown


MANY_TYPES = """\
schema: 1
cases:
- {id: text, type: text, text: zzzzz}
- {id: made, type: generate, prompt: a, match: A}
- {id: pair, type: minimal_pair, good: aA, bad: aB}
- {id: open, prompt: b, answers: [A], joined: true}
- {id: which, type: schema, contexts: [x, a], continuation: A, gold: 1, joined: true}
"""


@pytest.fixture
def baseline() -> list[str]:
    """Two checkpoints, and the argument that compares with the first one."""
    make_checkpoint("checkpoints/step-1000.ckpt", LETTER_CASES[:9], tied="j", step=1000)
    make_checkpoint("checkpoints/step-2000.ckpt", LETTER_CASES[:9], step=2000)
    return ["--baseline", "checkpoints/step-1000.ckpt"]


def test_no_column_is_cut_with_every_type_of_case(baseline, capsys):
    Path("more.yaml").write_text(MANY_TYPES)
    assert "…" not in tables(capsys, *baseline, suites=("cases.yaml", "more.yaml"))


def test_no_column_is_cut_with_many_categories(baseline, capsys):
    """Each name is printed twice by category, once over training, once against the baseline."""
    lines = LETTER_SUITE.splitlines(keepends=True)
    for i, letter in enumerate(LETTER_CASES, len(lines) - len(LETTER_CASES)):
        name = f"category: a category of {letter}"
        lines[i] = lines[i].replace("category: first", name).replace("category: second", name)
    Path("wide.yaml").write_text("".join(lines))
    shown = tables(capsys, *baseline, suites=("wide.yaml",))
    assert "…" not in shown
    for letter in LETTER_CASES:
        assert shown.count(f"a category of {letter}") == 4


def test_over_training_the_rank_correlation_and_the_first_step_above_chance_are_shown(capsys):
    right = {
        100: LETTER_CASES[:3],
        200: LETTER_CASES[:11],
        300: LETTER_CASES[:9],
        400: LETTER_CASES[1:12] + LETTER_CASES[12:16],
        500: LETTER_CASES[:10] + LETTER_CASES[13:18],
    }
    for step, letters in right.items():
        make_checkpoint(f"checkpoints/step-{step}.ckpt", letters, step)
    shown = tables(capsys)
    assert "learned from step 400 to 500: 3 (a, q, r)" in shown
    assert "forgotten from step 400 to 500: 3 (k, l, m)" in shown
    ranks = {
        "macro": [1, 3, 2, 4.5, 4.5],
        "first": [1, 4.5, 2, 4.5, 3],  # of 3, 11, 9, 11 and 10 right
        "second": [2, 2, 2, 4, 5],  # of 0, 0, 0, 4 and 5 right
    }
    expected = [np.corrcoef(range(5), each)[0, 1] for each in ranks.values()]
    correlations = " ".join(f"{x:+.2f}" for x in expected)
    assert f"rank correlation with step {correlations}" in shown
    assert "above chance from step 400 never" in shown


def test_differences_from_a_baseline_are_paired_and_a_star_marks_those_that_exclude_zero(capsys):
    """The first category gains 8 of 12, the second loses 1 of 12."""
    make_checkpoint("base.ckpt", LETTER_CASES[:3] + LETTER_CASES[12:14])
    make_checkpoint("new.ckpt", LETTER_CASES[:11] + LETTER_CASES[13:14])
    shown = tables(capsys, "--checkpoints", "new.ckpt", "--baseline", "base.ckpt")
    assert "against base.ckpt; * is a paired interval that excludes zero" in shown
    row = shown.split("against base.ckpt")[1].split("new.ckpt")[1]
    assert row.split()[0] == f"{(8 - 1) / 24:+.1%}"
    assert row.endswith("] 8 1 0.0391 +66.7%* -8.3%")  # p = 2 (1 + 9) / 2^9
