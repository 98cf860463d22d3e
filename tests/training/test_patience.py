"""`training.patience`: a run ends after so many validations without a lower loss, and stays ended.

The rate of these runs changes no weight, so that the first validation has the lowest loss.
"""

import shutil
from pathlib import Path

import pytest

from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.errors import UserError
from tests.support.training import (
    end_equal,
    read_rows,
    run,
    run_stopped_after,
)

STILL = ("training.lr=1e-30", "training.val_every_steps=2", "model.dropout=0")


def last_step(name: str = "final.ckpt") -> int:
    return read_checkpoint(f"checkpoints/{name}")["global_step"]


def test_a_run_ends_when_its_patience_does(folder, capsys):
    run(*STILL, "training.patience=2")
    assert (last_step(), last_step("last.ckpt"), last_step("best.ckpt")) == (6, 6, 2)
    assert [row["step"] for row in read_rows() if row["val/loss"]] == ["2", "4", "6"]
    out = capsys.readouterr().out
    assert "Done: 6 of 12 steps in" in out and "no lower validation loss in 2 validations" in out
    with pytest.raises(UserError) as error:
        run(*STILL, "training.patience=2", "training.max_steps=20")
    assert "finished: 6 of 20 steps and 2 validations without a lower loss" in str(error.value)
    assert "raise training.patience to continue it" in str(error.value)


def test_more_patience_continues_the_run_as_if_it_had_been_there_from_the_beginning(folder):
    run(*STILL, "training.patience=2")
    run(*STILL, "training.patience=4")
    assert last_step() == 10
    run(*STILL, "training.patience=4", "run.name=whole")
    assert end_equal("checkpoints", "checkpoints/whole")


def test_the_validations_waited_are_counted_across_a_stop(folder):
    run_stopped_after(5, *STILL, "training.patience=2")
    run(*STILL, "training.patience=2")
    assert last_step() == 6


def test_a_run_that_was_killed_before_its_verdict_makes_it(folder, capsys):
    run(*STILL, "training.patience=2")
    Path("checkpoints/final.ckpt").unlink()
    shutil.rmtree("logs")
    capsys.readouterr()
    run(*STILL, "training.patience=2")
    assert last_step() == 6
    assert "Done: 6 of 12 steps in" in capsys.readouterr().out


def test_a_lower_loss_begins_the_count_again(folder):
    run("training.patience=1", "training.val_every_steps=4", "training.lr=1e-3")
    losses = [float(row["val/loss"]) for row in read_rows() if row["val/loss"]]
    assert losses == sorted(losses, reverse=True) and last_step() == 12
