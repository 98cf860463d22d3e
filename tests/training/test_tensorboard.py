"""The event files of a run, read as TensorBoard reads them."""

from pathlib import Path

import pytest

from tests.support.training import read_events, read_rows, run, run_stopped_after

COLUMNS = {  # sub-run -> tag -> column of metrics.csv
    "train": {
        "loss": "train/loss",
        "loss/bits_per_byte": "train/bpb",
        "optimizer/learning_rate": "train/lr",
        "optimizer/gradient_norm": "train/grad_norm",
        "performance/tokens_per_second": "perf/tokens_per_second",
        "performance/memory_mb": "perf/memory_mb",
    },
    "validation": {
        "loss": "val/loss",
        "loss/bits_per_byte": "val/bpb",
        "loss/perplexity": "val/perplexity",
    },
}


@pytest.fixture(scope="module")
def events(finished_folder):
    """The events of each sub-run of a finished run."""
    return {name: read_events(finished_folder / "logs" / name) for name in COLUMNS}


@pytest.mark.parametrize("name", COLUMNS)
def test_each_sub_run_has_its_tags_and_nothing_else(events, name):
    assert set(events[name].Tags()["scalars"]) == set(COLUMNS[name])


def test_the_training_and_the_validation_loss_share_the_tag_that_comes_first(events):
    """TensorBoard draws a tag of several runs as one chart, and sorts the charts by tag."""
    train, validation = (set(events[name].Tags()["scalars"]) for name in COLUMNS)
    assert train & validation == {"loss", "loss/bits_per_byte"}
    assert sorted(train | validation)[0] == "loss"


@pytest.mark.parametrize("name, tag", [(name, tag) for name in COLUMNS for tag in COLUMNS[name]])
def test_the_points_are_those_of_metrics_csv(events, finished_folder, name, tag):
    column = COLUMNS[name][tag]
    rows = [row for row in read_rows(finished_folder / "logs/metrics.csv") if row[column]]
    points = events[name].Scalars(tag)
    assert rows and [point.step for point in points] == [int(row["step"]) for row in rows]
    assert [point.value for point in points] == pytest.approx(
        [float(row[column]) for row in rows], rel=1e-4
    )  # the CSV has six digits


def test_there_are_texts_pictures_and_hyperparameters_without_cards_of_their_own(events):
    assert "config/text_summary" in events["train"].Tags()["tensors"]
    assert "samples/text_summary" in events["validation"].Tags()["tensors"]
    assert events["validation"].Tags()["images"] == ["summary/loss"]
    [picture] = events["validation"].Images("summary/loss")
    assert picture.step == 12
    hparams = events["validation"].PluginTagToContent("hparams")
    assert "_hparams_/session_start_info" in hparams


def test_a_resumed_run_has_one_point_for_each_step_in_both_sub_runs(folder):
    """It resumes from step 6: the points of steps 8 and 10, already written, are taken back."""
    run_stopped_after(11, "training.keep_checkpoints=0")
    for name in ("last", "best", "step-00000009", "step-00000010", "step-00000011"):
        Path(f"checkpoints/{name}.ckpt").unlink()
    run()
    rows = read_rows()
    for name, column in (("train", "train/loss"), ("validation", "val/loss")):
        steps = [point.step for point in read_events(f"logs/{name}").Scalars("loss")]
        assert steps == [int(row["step"]) for row in rows if row[column]]


def test_the_event_files_of_a_named_run_are_in_its_own_folder(folder):
    run("run.name=mine", "training.max_steps=2")
    assert {path.name for path in Path("logs").iterdir()} == {"mine"}
    assert {path.name for path in Path("logs/mine").iterdir()} == {
        "metrics.csv", "train", "validation"
    }  # fmt: skip
