"""The command evaluate_checkpoints.py: which checkpoints it scores, its errors and exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate_checkpoints
from evaluate_checkpoints import BROKEN, MISSED
from pocketlm.errors import UserError, run_main
from tests.support.bigrams import make_checkpoint
from tests.support.probes import LETTER_CASES, LETTER_SUITE

ROOT = Path(__file__).parents[2]
CASES = ["--cases", "cases.yaml"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, which holds only suites."""
    monkeypatch.chdir(tmp_path)
    Path("cases.yaml").write_text(LETTER_SUITE)
    Path("text.yaml").write_text("schema: 1\ncases: [{id: t, type: text, text: zzzzz}]")
    Path("again.yaml").write_text("- {name: a, prompt: other, target: A}")
    Path("long.yaml").write_text(f"- {{name: long, prompt: {'a' * 20}, target: A}}")
    return tmp_path


def scored(capsys, *arguments: str) -> list[list[str]]:
    """Run the command; return the names of each checkpoint it scores."""
    assert evaluate_checkpoints.main([*CASES, "--json", *arguments]) == 0
    return [result["names"] for result in json.loads(capsys.readouterr().out)["checkpoints"]]


# ---- which checkpoints are scored ----


def test_a_file_named_twice_is_scored_once(capsys):
    make_checkpoint("a.ckpt", "abc")
    assert scored(capsys, "--checkpoints", "a.ckpt", "*.ckpt", "a.ckpt") == [["a.ckpt"]]


def test_by_default_the_unnamed_run_is_scored_and_else_the_best_named_one(capsys):
    make_checkpoint("checkpoints/one/best.ckpt", "abc")
    make_checkpoint("checkpoints/one/step-00000001.ckpt", "ab")
    named = [["checkpoints/one/best.ckpt"], ["checkpoints/one/step-00000001.ckpt"]]
    assert scored(capsys) == named
    assert evaluate_checkpoints.main(CASES) == 0
    assert "scoring checkpoints/one/*.ckpt" in capsys.readouterr().err
    make_checkpoint("checkpoints/last.ckpt", "a")
    assert scored(capsys) == [["checkpoints/last.ckpt"]]


def test_the_first_problem_of_a_suite_is_printed(capsys):
    make_checkpoint("a.ckpt", "")
    assert evaluate_checkpoints.main(["--cases", "again.yaml", "--checkpoints", "a.ckpt"]) == 0
    problem = "again.yaml:1: a: the answer 'A' has no leading space; write ' A', or joined: true"
    error = capsys.readouterr().err
    assert problem in error
    assert "(1 of 2 problems; --validate-only lists all)" in error


# ---- numbers that are not finite ----


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"], ["--markdown"]])
def test_a_checkpoint_with_broken_weights_is_named_and_not_ranked(capsys, form):
    make_checkpoint("good.ckpt", LETTER_CASES[:3])
    make_checkpoint("broken.ckpt", LETTER_CASES, broken=True)
    checkpoints = ["--checkpoints", "broken.ckpt", "good.ckpt"]
    assert evaluate_checkpoints.main([*CASES, *checkpoints, *form]) == BROKEN
    captured = capsys.readouterr()
    assert "not ranked, as log-probabilities are not finite: broken.ckpt" in captured.err
    assert "broken.ckpt" not in captured.out
    assert "good.ckpt" in captured.out


def test_only_broken_checkpoints_or_a_broken_baseline_are_refused():
    make_checkpoint("good.ckpt", LETTER_CASES[:3])
    make_checkpoint("broken.ckpt", LETTER_CASES, broken=True)
    message = (
        "broken.ckpt: the log-probabilities are not finite, so the weights are broken; "
        "nothing to rank"
    )
    with pytest.raises(UserError, match=message):
        evaluate_checkpoints.main([*CASES, "--checkpoints", "broken.ckpt"])
    baseline = ["--checkpoints", "good.ckpt", "--baseline", "broken.ckpt"]
    with pytest.raises(UserError, match="--baseline broken.ckpt: the log-probabilities are not"):
        evaluate_checkpoints.main([*CASES, *baseline])


# ---- thresholds ----


@pytest.fixture
def two() -> list[str]:
    """The arguments for two checkpoints; the best has 12 of 12 and 3 of 12 cases right."""
    make_checkpoint("a.ckpt", LETTER_CASES[:15])
    make_checkpoint("b.ckpt", "")
    return [*CASES, "--checkpoints", "b.ckpt", "a.ckpt", "--csv"]


def test_the_status_is_0_if_all_thresholds_are_reached(two):
    arguments = []
    for threshold in ("first=1", "second=0.25", "macro=0.625", "micro=0.625"):
        arguments += ["--fail-under", threshold]
    assert evaluate_checkpoints.main(two + arguments) == 0


@pytest.mark.parametrize(
    "name, threshold, value",
    [("second", "0.26", "0.250"), ("macro", "0.63", "0.625"), ("micro", "0.7", "0.625")],
)
def test_the_status_is_3_if_an_accuracy_is_below_its_threshold(two, capsys, name, threshold, value):
    assert evaluate_checkpoints.main([*two, "--fail-under", f"{name}={threshold}"]) == MISSED
    assert f"a.ckpt: {name} is {value}, below {threshold}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "threshold, message",
    [
        ("third=0.5", "there is no category 'third'; there are macro, micro, first, second"),
        ("first", "write CATEGORY=SCORE, for example second=0.5"),
        ("first=high", "write CATEGORY=SCORE"),
        ("first=", "write CATEGORY=SCORE"),
        ("=0.5", "there is no category ''"),
        ("first=60", "an accuracy is between 0 and 1"),
        ("first=nan", "an accuracy is between 0 and 1"),
    ],
)
def test_a_wrong_threshold_is_refused(two, threshold, message):
    with pytest.raises(UserError, match=message):
        evaluate_checkpoints.main([*two, "--fail-under", threshold])


def test_a_threshold_for_texts_is_refused(two):
    command = ["--cases", "text.yaml", "--checkpoints", "a.ckpt", "--fail-under", "macro=0.5"]
    with pytest.raises(UserError, match="--fail-under needs accuracies, and texts have none"):
        evaluate_checkpoints.main(command)


# ---- the command line ----

MISTAKES = [
    ([], "there are no cases; pass --cases FILE"),
    (
        [*CASES, "--checkpoints", "none/*.ckpt"],
        "no checkpoint matches 'none/*.ckpt'; here are checkpoints/a.ckpt",
    ),
    (["--cases", "missing.yaml"], "no suite matches 'missing.yaml'"),
    (
        ["--blimp", "missing.zip"],
        "--blimp missing.zip is not a folder or a zip file that can be read",
    ),
    ([*CASES, "again.yaml"], "again.yaml:1: the id of 'a' is already at cases.yaml:5"),
    ([*CASES, "--tokenizer", "byte"], "was trained with the tokenizer 'char'"),
    ([*CASES, "--top-k", "0"], "--top-k is 0"),
    ([*CASES, "--checkpoints", "broken/b.ckpt"], "not finite"),
    (
        [*CASES, "--checkpoints", "broken/c.ckpt"],
        "broken/c.ckpt is truncated or not a checkpoint",
    ),
    ([*CASES, "--baseline", "none.ckpt"], "there is no checkpoint none.ckpt"),
    ([*CASES, "--fail-under", "third=1"], "there is no category 'third'"),
    ([*CASES, "--tensorboard", "cases.yaml", "--csv"], "cases.yaml"),
    (["--cases", "long.yaml"], "the case 'long' has 22 tokens and the model a context of 16"),
    ([*CASES, "--json", "--csv"], "not allowed with argument"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=[str(m) for _, m in MISTAKES])
def test_a_mistake_on_the_command_line_gets_one_sentence_and_status_2(
    monkeypatch, capsys, arguments, message
):
    make_checkpoint("checkpoints/a.ckpt", "abc")
    make_checkpoint("broken/b.ckpt", "abc", broken=True)
    Path("broken/c.ckpt").write_text("not a checkpoint")
    monkeypatch.setattr(sys, "argv", ["evaluate_checkpoints.py", *arguments])
    with pytest.raises(SystemExit) as end:
        run_main(evaluate_checkpoints.main)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert message in error
    assert error.count("error: ") == 1


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["cases.yaml", "--validate-only"], 0),
        (["none.yaml"], 2),
        (["cases.yaml", "--fail-under", "first=0.9"], 3),
    ],
    ids=["ok", "mistake", "threshold"],
)
def test_the_program_ends_with_its_status(arguments, status):
    make_checkpoint("checkpoints/a.ckpt", "abc")
    command = [sys.executable, ROOT / "evaluate_checkpoints.py", "--cases", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
