"""The command harness.py: exporting suites as lm-eval tasks, and scoring a checkpoint on them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import lm_eval.tasks.manager
import pytest

import harness
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import Case, load_suite
from pocketlm.evaluation.results import evaluate
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.lm_eval_tasks import OWN_SUITE, save_random

ROOT = Path(__file__).parents[2]
GRAMMAR = ROOT / "cases/grammar.yaml"
OWN_TASKS = ["own_suite_choice", "own_suite_schema", "own_suite_cloze", "own_suite_text"]


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture
def own(tmp_path) -> Path:
    """The file of the suite."""
    path = tmp_path / "own.yaml"
    path.write_text(OWN_SUITE)
    return path


# ---- exporting ----


def test_export_prints_the_tasks_and_what_is_left_out(own, tmp_path, capsys):
    own.write_text(OWN_SUITE.replace("scoring: byte", "scoring: pmi"))
    assert harness.main(["export", "--cases", str(own), "--to", str(tmp_path / "new/tasks")]) == 0
    out, err = capsys.readouterr()
    assert out.split() == OWN_TASKS
    assert err.splitlines() == [
        "own suite: 1 cases with several answers and no distractors are left out",
        "own suite: 1 cases of type generate are left out",
        "own suite: 1 cases are scored by token or pmi here, and by their sum in lm-eval",
    ]


def test_right_choices_are_not_always_first():
    """lm-eval takes the first of equal choices, so a model that knows nothing would be right."""
    rows = [harness.as_row(case)[1] for case in load_suite(GRAMMAR).cases]
    assert 0.3 < sum(row["target"] == [0] for row in rows) / len(rows) < 0.7


@pytest.mark.parametrize("name", map(str, range(9)))
def test_rotated_choices_have_the_right_targets(name):
    fields = dict(prompt="p", answers=("1", "2"), distractors=("3", "4", "5"))
    _, row = harness.as_row(Case(name, "choice", **fields))
    assert sorted(row["choices"]) == ["1", "2", "3", "4", "5"]
    assert [row["choices"][i] for i in row["target"]] == ["1", "2"]


def test_two_suites_of_one_name_are_refused(own, tmp_path):
    (tmp_path / "twin.yaml").write_text(OWN_SUITE.replace("own suite", "own/suite"))
    command = ["export", "--cases", str(tmp_path / "*n.yaml"), "--to", str(tmp_path)]
    with pytest.raises(UserError, match="two suites are called own_suite"):
        harness.main(command)


# ---- scoring ----


def test_run_prints_the_accuracies_as_a_table_or_as_json(tmp_path, capsys):
    checkpoint = save_random(tmp_path / "a.ckpt", ByteTokenizer())
    harness.export_suite(load_suite(GRAMMAR), tmp_path)
    command = ["run", "--ckpt", str(checkpoint.path), "--include", str(tmp_path)]
    command += ["--tasks", "grammar"]
    assert harness.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    [result] = evaluate([str(checkpoint.path)], load_suite(GRAMMAR))
    assert report["results"]["grammar_choice"]["acc,none"] == pytest.approx(result.correct.mean())
    assert report["config"]["weights_sha256"] == checkpoint.weights_sha256
    assert harness.main([*command, "--limit", "3"]) == 0
    assert "|grammar_choice|" in capsys.readouterr().out


def test_a_continuation_without_any_context_is_refused(own, tmp_path):
    """A minimal pair without a common start, and a tokenizer without a document prefix."""
    tokenizer = CharTokenizer.train(["the cat sat."], eos=False)
    checkpoint = save_random(tmp_path / "a.ckpt", tokenizer)
    own.write_text(OWN_SUITE.replace("the sat cat", "cat the sat"))
    harness.export_suite(load_suite(own), tmp_path)
    command = ["run", "--ckpt", str(checkpoint.path), "--include", str(tmp_path)]
    message = "a task scores 12 tokens after 0; this model can score 1 to 160 tokens after 1"
    with pytest.raises(UserError, match=message):
        harness.main([*command, "--tasks", "own_suite_choice"])


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    checkpoint = save_random(tmp_path / "a.ckpt", ByteTokenizer())
    command = ["run", "--ckpt", str(checkpoint.path), "--include", str(tmp_path / "none")]
    with pytest.raises(UserError, match="none is not a folder; make it with"):
        harness.main([*command, "--tasks", "own_suite"])


def test_an_unknown_task_is_refused_with_the_names_of_those_in_the_folder(
    own, tmp_path, monkeypatch
):
    """It is none of lm-eval's own either. Of those, reading one folder is enough here."""
    arc = Path(lm_eval.tasks.manager.__file__).parent / "arc"
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(arc / "manager.py"))
    checkpoint = save_random(tmp_path / "a.ckpt", ByteTokenizer())
    harness.export_suite(load_suite(own), tmp_path)
    command = ["run", "--ckpt", str(checkpoint.path), "--include", str(tmp_path)]
    message = "no task of lm-eval is called grammer; .* there are own_suite, own_suite_choice"
    with pytest.raises(UserError, match=message):
        harness.main([*command, "--tasks", "own_suite,arc_easy,grammer"])


# ---- without lm-eval ----


def test_a_missing_lm_eval_is_reported(tmp_path, monkeypatch):
    checkpoint = save_random(tmp_path / "a.ckpt", ByteTokenizer())
    monkeypatch.delitem(sys.modules, "pocketlm.evaluation.lm_eval_adapter", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="lm-eval cannot be imported .* pip install -r"):
        harness.as_lm(checkpoint)


def test_neither_command_imports_lm_eval_before_it_is_needed():
    program = "import sys, harness, evaluate_checkpoints; print('lm_eval' in sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
