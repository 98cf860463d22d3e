"""JSON, CSV, Markdown, the plot and TensorBoard hold the numbers of the results."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch

import evaluate_checkpoints
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import load_suite
from pocketlm.evaluation.exports import CSV_FIELDS
from pocketlm.evaluation.results import by_step, evaluate, summarise
from pocketlm.evaluation.statistics import DRAWS, SEED, mean_interval, wilson_interval
from tests.support.bigrams import LETTERS, make_checkpoint
from tests.support.probes import LETTER_CASES, LETTER_SUITE, MIXED_SUITE

EXACT = 1e-6  # float32 log-probabilities of one letter, made into a probability


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, which holds only two suites."""
    monkeypatch.chdir(tmp_path)
    Path("cases.yaml").write_text(LETTER_SUITE)
    Path("mixed.yaml").write_text(MIXED_SUITE)
    return tmp_path


@pytest.fixture
def mixed() -> list[str]:
    """Two checkpoints, and the argument for a suite with every type of case."""
    make_checkpoint("checkpoints/a.ckpt", "ab", step=100, tied="x")
    make_checkpoint("checkpoints/b.ckpt", "c", step=200, tied="x")
    return ["--cases", "mixed.yaml"]


def run(capsys, *arguments: str) -> str:
    """Run the command; return what it prints."""
    assert evaluate_checkpoints.main([*arguments]) == 0
    return capsys.readouterr().out


def read_json(text: str) -> dict:
    """Parse strict JSON, which has no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# ---- JSON ----


def test_json_has_the_suite_and_how_it_was_scored(mixed, capsys):
    report = read_json(run(capsys, *mixed, "--json", "--top-k", "3"))
    sha256 = load_suite("mixed.yaml").sha256
    assert report["schema"] == 2
    assert report["suite"] == {"name": "mixed", "sha256": sha256, "cases": 5, "skipped": 0}
    expected = {"bootstrap_draws": DRAWS, "bootstrap_seed": SEED, "top_k": 3}
    expected |= {"torch": torch.__version__, "dtype": "float32", "device": "cpu"}
    assert expected.items() <= report["made_with"].items()
    assert report["cases"][0] == {
        "id": "pair",
        "type": "minimal_pair",
        "category": "mixed",
        "group": "pair",
        "scoring": "sum",
        "good": "aA",
        "bad": "aB",
        "max_new_tokens": 20,
    }


def test_json_has_the_checkpoints_and_their_scores(mixed, capsys):
    report = read_json(run(capsys, *mixed, "--json", "--top-k", "3"))
    first, second = report["checkpoints"]
    assert (first["names"], first["step"]) == (["checkpoints/a.ckpt"], 100)
    assert (first["tokens"], first["val_loss"]) == (1000, 2.0)
    sha256 = load_checkpoint("checkpoints/a.ckpt").weights_sha256
    assert first["weights_sha256"] == sha256 != second["weights_sha256"]
    assert first["tokenizer_sha256"] == LETTERS.fingerprint
    assert list(first["categories"]) == ["mixed", "micro"]
    assert (first["macro"]["accuracy"], second["macro"]["accuracy"]) == (2.5 / 4, 1.5 / 4)
    scores = {score["id"]: score for score in first["scores"]}
    correct = {name: score["correct"] for name, score in scores.items()}
    assert correct == {"pair": 1, "open": 1, "text": None, "made": 0, "tied": 0.5}
    # after the start of a document, all 30 tokens have the same probability
    assert scores["pair"]["logprob"] == pytest.approx(math.log(0.6 / 30), abs=1e-5)
    assert len(scores["open"]["top"]) == 3
    assert scores["open"]["top"][0] == ["A", pytest.approx(0.6, abs=EXACT)]
    assert scores["made"]["generated"].startswith("B")


def test_json_has_paired_comparisons_with_the_first_checkpoint(mixed, capsys):
    [pair] = read_json(run(capsys, *mixed, "--json"))["comparisons"]
    assert (pair["first"], pair["second"]) == ("checkpoints/a.ckpt", "checkpoints/b.ckpt")
    assert pair["difference"] == pytest.approx(0.25)
    assert pair["mcnemar"] == {"won": 2, "lost": 1, "p": 1.0}


def test_json_has_paired_comparisons_with_a_baseline(capsys):
    make_checkpoint("base.ckpt", LETTER_CASES[:3] + LETTER_CASES[12:14])
    make_checkpoint("new.ckpt", LETTER_CASES[:11] + LETTER_CASES[13:14])
    arguments = ["--checkpoints", "new.ckpt", "--baseline", "base.ckpt", "--json"]
    [pair] = read_json(run(capsys, "--cases", "cases.yaml", *arguments))["comparisons"]
    assert (pair["first"], pair["second"]) == ("new.ckpt", "base.ckpt")
    assert pair["mcnemar"] == {"won": 8, "lost": 1, "p": 2 * 10 / 2**9}
    assert pair["difference"] == pytest.approx(7 / 24)
    assert 0 < pair["interval"][0] < 7 / 24 < pair["interval"][1]


# ---- CSV and Markdown ----


def test_csv_has_a_row_for_each_checkpoint_and_case_with_the_numbers_of_the_json(mixed, capsys):
    report = read_json(run(capsys, *mixed, "--json"))
    rows = list(csv.DictReader(io.StringIO(run(capsys, *mixed, "--csv"))))
    assert len(rows) == 2 * 5
    for i, row in enumerate(rows):
        checkpoint, case = report["checkpoints"][i // 5], report["cases"][i % 5]
        score = checkpoint["scores"][i % 5]
        assert row["checkpoint"] == checkpoint["names"][0]
        assert row["step"] == str(checkpoint["step"])
        assert row["trained_tokens"] == str(checkpoint["tokens"])
        assert row["case"] == case["id"]
        for name in ("type", "category", "group"):
            assert row[name] == case[name]
        for name in CSV_FIELDS:
            if isinstance(score[name], int | float):
                expected = pytest.approx(float(score[name]), rel=1e-5)  # six digits
                assert float(row[name]) == expected, name
            else:
                assert row[name] == (score[name] or "")


def test_markdown_has_a_row_for_each_checkpoint_and_a_column_for_each_category(capsys):
    make_checkpoint("a.ckpt", LETTER_CASES[:15])
    make_checkpoint("b.ckpt", "", step=1000)
    checkpoints = ["--checkpoints", "a.ckpt", "b.ckpt"]
    lines = run(capsys, "--cases", "cases.yaml", *checkpoints, "--markdown").splitlines()
    low, high = mean_interval([(12, 12), (3, 12)])
    first, second = (
        f"{right / 12:.1%} [{100 * a:.1f}%, {100 * b:.1f}%]"
        for right, (a, b) in ((n, wilson_interval(n, 12)) for n in (12, 3))
    )
    assert lines[:3] == [
        "| checkpoint | step | accuracy | first | second |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| a.ckpt | 1 | **62.5%** [{low:.1%}, {high:.1%}] | {first} | {second} |",
    ]
    assert lines[3].startswith("| b.ckpt | 1,000 | **0.0%** [0.0%, ")
    assert lines[4] == "| guessing | | | 50.0% | 50.0% |"


# ---- pictures ----


def test_the_plot_is_written_with_a_panel_for_each_category(mixed, capsys):
    from matplotlib import image

    assert evaluate_checkpoints.main([*mixed, "--plot", "new/probes.png", "--csv"]) == 0
    assert "picture: new/probes.png" in capsys.readouterr().err
    picture = image.imread("new/probes.png")
    rows, columns = 1, 2  # the mean over categories, and the category "mixed"
    size = (1.9 * rows + 0.4, 2.2 * columns + 0.4)  # inches of 120 dots
    assert picture.shape[:2] == tuple(round(120 * side) for side in size)
    assert picture.std() > 0.05  # not an empty sheet


def test_a_plot_in_an_unknown_format_is_refused(mixed, capsys):
    with pytest.raises(UserError, match="--plot probes.doc: "):
        evaluate_checkpoints.main([*mixed, "--plot", "probes.doc", "--csv"])


def test_tensorboard_has_the_accuracies_at_their_steps(mixed, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert evaluate_checkpoints.main([*mixed, "--tensorboard", "logs", "--csv"]) == 0
    assert "tensorboard --logdir logs" in capsys.readouterr().err
    events = EventAccumulator("logs").Reload()
    paths = ["checkpoints/a.ckpt", "checkpoints/b.ckpt"]
    results = by_step(evaluate(paths, load_suite("mixed.yaml")))
    expected = {
        "probes/macro": [r.macro for r in results],
        "probes/mixed/accuracy": [r.macro for r in results],
        "probes/mixed/p_correct": [summarise(r, "mixed", 5).p_correct for r in results],
        "probes/bits_per_byte": [r.scores[2].bits_per_byte for r in results],
    }
    assert sorted(events.Tags()["scalars"]) == sorted(expected)
    for tag, values in expected.items():
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [100, 200]
        # TensorBoard stores float32
        assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=1e-6)
