"""The files of a run: names, pruning, moving aside; a full disk and a loss that is not finite."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import train
from pocketlm import files
from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.errors import UserError
from pocketlm.training.checkpointing import Checkpoints
from pocketlm.training.monitors import NonFiniteGuard
from tests.support.training import run


def test_checkpoints_are_named_by_step_and_pruned(finished):
    """The run keeps two numbered checkpoints."""
    assert sorted(p.name for p in Path("checkpoints").glob("*.ckpt")) == [
        "best.ckpt",
        "final.ckpt",
        "last.ckpt",
        "step-00000010.ckpt",
        "step-00000012.ckpt",
    ]


def test_checkpoints_load_with_weights_only(finished):
    state = torch.load("checkpoints/final.ckpt", weights_only=True)
    assert state["pytorch-lightning_version"] and state["kit"]["config"]["model"]["d_model"] == 16
    assert torch.serialization.get_unsafe_globals_in_checkpoint("checkpoints/final.ckpt") == []


def test_the_progress_in_a_checkpoint_has_the_keys_of_earlier_versions(finished):
    """A run of an earlier version resumes from its checkpoint, and the other way round."""
    interval = torch.load("checkpoints/final.ckpt", weights_only=True)["interval"]
    assert set(interval) == {"nats", "targets", "tokens_seen", "validation"}
    assert set(interval["validation"]) == {"loss", "bpb", "perplexity"}


def test_fresh_moves_only_the_runs_own_files_aside_and_deletes_nothing(folder):
    """Event files of earlier versions lie directly in logs/, and a run was once named "train"."""
    run("training.max_steps=3")
    run("training.max_steps=3", "run.name=other")
    earlier = Path("logs/events.out.tfevents.1")
    earlier.write_bytes(b"earlier")
    own = {
        path: path.read_bytes()
        for folder in ("checkpoints", "logs")
        for path in Path(folder).rglob("*")
        if path.is_file() and not path.name.startswith(".lock") and "other" not in path.parts
    }
    assert {path.parent for path in own} == {
        Path("checkpoints"), Path("logs"), Path("logs/train"), Path("logs/validation")
    }  # fmt: skip
    others = {path: path.read_bytes() for path in Path("logs/other").rglob("*") if path.is_file()}
    run("training.max_steps=3", flags=("--fresh",))
    moved = {}
    for top in ("checkpoints", "logs"):
        [old] = Path(top).glob("old-*")
        for path in old.rglob("*"):
            if path.is_file():
                moved[Path(top) / path.relative_to(old)] = path.read_bytes()
    assert moved == own
    assert {path: path.read_bytes() for path in others} == others
    assert Path("checkpoints/other/final.ckpt").exists()


def test_fresh_leaves_an_earlier_run_named_train_alone(folder):
    run("training.max_steps=3")
    Path("logs/train/metrics.csv").write_text("step\n")
    run("training.max_steps=3", flags=("--fresh",))
    [old] = Path("logs").glob("old-*")
    assert Path("logs/train/metrics.csv").exists()
    assert (old / "validation").is_dir() and not (old / "train").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(folder, monkeypatch):
    original = train.LitTransformer.training_step

    def training_step(self, batch, index):
        return original(self, batch, index) * (float("nan") if self.trainer.global_step == 7 else 1)

    monkeypatch.setattr(train.LitTransformer, "training_step", training_step)
    with pytest.raises(UserError, match="the gradient is not finite at step 8"):
        run()
    for path in Path("checkpoints").glob("*.ckpt"):
        assert all(torch.isfinite(p).all() for p in read_checkpoint(path)["state_dict"].values())


def test_a_loss_that_is_not_finite_is_seen_where_no_gradient_is_looked_at(folder, monkeypatch):
    """As on a GPU, where reading the norm of each step would wait for the device."""
    original = train.LitTransformer.loss_sum

    def loss_sum(self, batch):
        return original(self, batch) * (float("nan") if self.training else 1)

    monkeypatch.setattr(train.LitTransformer, "loss_sum", loss_sum)
    monkeypatch.setattr(NonFiniteGuard, "allows_step", lambda *_: True)
    with pytest.raises(UserError, match="the training loss is not finite at step 1"):
        run()


def test_a_validation_loss_that_is_not_finite_is_not_the_best(folder, monkeypatch):
    original = train.LitTransformer.on_validation_epoch_end

    def on_validation_epoch_end(self):
        original(self)
        if self.trainer.global_step == 5:
            self.progress.validation["loss"] = math.nan

    monkeypatch.setattr(train.LitTransformer, "on_validation_epoch_end", on_validation_epoch_end)
    run()
    assert read_checkpoint("checkpoints/best.ckpt")["global_step"] == 12


def test_a_full_disk_is_a_sentence_and_the_old_checkpoint_stays(folder, monkeypatch):
    original = files.os.fsync
    calls = []

    def full(handle):
        calls.extend(folder.glob("checkpoints/last.ckpt"))
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        original(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left.*untouched"):
        run()
    monkeypatch.undo()
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] >= 3
    assert not list((folder / "checkpoints").glob(".*.unfinished"))


def test_a_folder_that_is_removed_under_a_run_is_made_again(folder, monkeypatch):
    save = Checkpoints.save

    def remove_and_save(self, *arguments):
        shutil.rmtree("checkpoints")
        save(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", remove_and_save)
    run("training.max_steps=3")
    assert read_checkpoint("checkpoints/final.ckpt")["global_step"] == 3
