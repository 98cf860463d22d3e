"""The files of a run after kills and damage: what stands inside them decides, and names follow."""

import math
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pocketlm.checkpoint.changes import Previous, describe_hardware
from pocketlm.checkpoint.format import FORMAT, read_checkpoint, save_checkpoint
from pocketlm.checkpoint.resume import ResumePoint, SavedRun, find_resume_point, read_previous
from pocketlm.checkpoint.runs import Run
from pocketlm.config.sections import Config, TrainingConfig
from pocketlm.errors import UserError
from pocketlm.hardware.devices import Hardware
from pocketlm.optim import WeightAverage
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.training.checkpointing import Checkpoints
from pocketlm.training.module import TrainingProgress
from tests.support.checkpoints import resumable_checkpoint

RUN = Run("")
CHECKPOINTS = Path("checkpoints")
HARDWARE = describe_hardware(Hardware("cpu", "32-true", False, {}), 1)


@pytest.fixture(autouse=True)
def _checkpoints(folder, monkeypatch):
    CHECKPOINTS.mkdir()
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nobody cuts the power


def write(name: str, step: int, val_loss: float | None = None, **training) -> None:
    save_checkpoint(resumable_checkpoint(step, val_loss, **training), CHECKPOINTS / name)


def contents() -> dict[str, tuple[int, float | None]]:
    """Return the step and the validation loss that stand in the file of each name."""
    states = {
        path.name: read_checkpoint(path, metadata_only=True) for path in CHECKPOINTS.glob("*.ckpt")
    }
    return {
        name: (state["global_step"], state["kit"]["val_loss"]) for name, state in states.items()
    }


# ---- what decides ----


def test_the_step_inside_decides_and_not_the_name(capsys):
    """A kill between two renames leaves last.ckpt older than a numbered file."""
    write("last.ckpt", 3)
    write("step-00000003.ckpt", 3)
    write("step-00000006.ckpt", 6)
    saved = SavedRun(RUN)
    assert saved.newest.path.name == "step-00000006.ckpt"
    assert not saved.repair(3)
    assert contents()["last.ckpt"] == (6, None)
    assert "checkpoints/last.ckpt is step-00000006.ckpt again" in capsys.readouterr().err


def test_the_lowest_validation_loss_inside_is_the_best():
    """Only of steps that were validated: others repeat the loss of the validation before them."""
    write("best.ckpt", 5, 2.0)
    write("step-00000005.ckpt", 5, 2.0)
    write("step-00000010.ckpt", 10, 1.5)
    write("step-00000011.ckpt", 11, 1.5)
    SavedRun(RUN).repair(3)
    assert contents()["best.ckpt"] == (10, 1.5)
    assert contents()["last.ckpt"] == (11, 1.5)


def test_a_better_model_that_is_older_keeps_its_name():
    write("best.ckpt", 5, 1.5)
    write("step-00000010.ckpt", 10, 2.0)
    SavedRun(RUN).repair(3)
    assert contents()["best.ckpt"] == (5, 1.5)


def test_a_loss_that_is_not_finite_is_not_the_best():
    write("step-00000005.ckpt", 5, 2.0)
    write("step-00000010.ckpt", 10, math.nan)
    SavedRun(RUN).repair(3)
    assert contents()["best.ckpt"] == (5, 2.0)


def test_the_final_step_gets_its_name():
    write("last.ckpt", 12, 1.5)
    assert SavedRun(RUN).repair(3)
    assert contents()["final.ckpt"] == contents()["best.ckpt"] == (12, 1.5)
    assert not SavedRun(RUN).repair(3)


# ---- damage ----


def flip(name: str) -> None:
    """Flip a bit of the weights in a file."""
    path = CHECKPOINTS / name
    weights = read_checkpoint(path)["state_dict"]["model.embed_tokens.weight"]
    raw = bytearray(path.read_bytes())
    raw[raw.index(weights.numpy().tobytes())] ^= 1
    path.write_bytes(raw)


def spoil(name: str) -> None:
    """Put a NaN into the optimizer's state in a file."""
    state = read_checkpoint(CHECKPOINTS / name)
    state["optimizer_states"][0]["state"] = {0: {"exp_avg": torch.tensor([1.0, math.nan])}}
    save_checkpoint(state, CHECKPOINTS / name)


@pytest.mark.parametrize(
    "damage, message", [(flip, "damaged at"), (spoil, "is not finite")], ids=["bit", "NaN"]
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_keeps_its_content_by_another_name(
    damage, message, capsys
):
    write("step-00000006.ckpt", 6)
    for name in ("last.ckpt", "step-00000009.ckpt"):
        write(name, 9)
        damage(name)
    before = (CHECKPOINTS / "last.ckpt").read_bytes()
    saved = SavedRun(RUN)
    assert saved.newest.step == 6
    saved.repair(3)
    assert message in capsys.readouterr().err
    assert contents() == {"step-00000006.ckpt": (6, None), "last.ckpt": (6, None)}
    assert (CHECKPOINTS / "last.ckpt.damaged").read_bytes() == before


def test_a_damaged_best_checkpoint_is_replaced_by_the_best_that_is_left():
    write("best.ckpt", 5, 1.0)
    flip("best.ckpt")
    write("step-00000010.ckpt", 10, 2.0)
    saved = SavedRun(RUN)
    saved.repair(3)
    assert contents()["best.ckpt"] == (10, 2.0)
    assert saved.best.val_loss == 2.0
    assert (CHECKPOINTS / "best.ckpt.damaged").exists()


def test_weights_without_the_state_of_a_run_are_passed_over_and_left_alone(capsys):
    write("step-00000006.ckpt", 6)
    state = resumable_checkpoint(9)
    del state["optimizer_states"]
    save_checkpoint(state, CHECKPOINTS / "best.ckpt")
    saved = SavedRun(RUN)
    assert saved.newest.step == 6
    saved.repair(3)
    assert "no run can resume from checkpoints/best.ckpt" in capsys.readouterr().err
    assert contents()["best.ckpt"] == (9, None)


@pytest.mark.parametrize(
    "path, value",
    [
        (("loops",), {}),
        (("loops", "fit_loop"), None),
        (("global_step",), 8),
        (("optimizer_states",), []),
        (("callbacks", "RandomState"), {"python": (3, (1, 2), None), "torch": None}),
        (("callbacks", "RandomState", "torch"), torch.zeros(7, dtype=torch.uint8)),
        (("callbacks", "Checkpoints"), {"best": "low"}),
        (("interval", "targets"), -1),
        (("interval", "validation"), [1]),
        (("loops", "fit_loop", "epoch_progress"), {"total": {"ready": -1}}),
        (("optimizer_states", 0, "state"), {0: {"exp_avg": torch.zeros(1).expand(10**9)}}),
    ],
    ids=str,
)
def test_a_state_that_is_no_runs_is_passed_over(path, value):
    write("step-00000006.ckpt", 6)
    state = resumable_checkpoint(9)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    save_checkpoint(state, CHECKPOINTS / "last.ckpt")
    assert SavedRun(RUN).newest.step == 6


def test_a_checkpoint_of_a_newer_version_is_not_taken_for_a_damaged_one():
    """Going back to an older one would lose what the newer version has trained."""
    write("step-00000006.ckpt", 6)
    state = resumable_checkpoint(9)
    state["kit"]["format"] = FORMAT + 1
    save_checkpoint(state, CHECKPOINTS / "last.ckpt")
    with pytest.raises(UserError, match="last.ckpt has format.*update"):
        SavedRun(RUN)


# ---- kills ----


class Killed(BaseException):
    """Stands for the end of the process: nothing of it runs any more."""


class Killer:
    """Ends the process before its event number `last`, a rename, a link or the like.

    Every later call ends too, so that `finally` clauses change nothing, as in a killed process.
    """

    def __init__(self, monkeypatch, last: int, *functions: str):
        self.last, self.events = last, 0
        for name in functions:
            monkeypatch.setattr(os, name, self.around(getattr(os, name)))

    def around(self, function):
        def with_event(path, *arguments, **keywords):
            is_harmless = function.__name__ == "unlink" and Path(path).name.endswith(".unfinished")
            self.events += not is_harmless
            if self.events >= self.last:
                raise Killed
            return function(path, *arguments, **keywords)

        return with_event


LOSSES = {10: 1.0, 12: 0.5}  # of the validated steps
SAVES = (9, 10, 12)


@cache
def saved_state(step: int, keep: int) -> dict:
    return resumable_checkpoint(step, LOSSES.get(step), keep_checkpoints=keep)


def save_from(first: int, best: float | None, keep: int) -> None:
    """Save the steps of SAVES from `first` on, as a run does that began with this best loss."""
    module = SimpleNamespace(
        model=torch.nn.Linear(1, 1), progress=TrainingProgress(), average=WeightAverage(0.0)
    )
    training = TrainingConfig(
        max_steps=12, val_every_steps=5, save_every_steps=1, keep_checkpoints=keep
    )
    data = SimpleNamespace(tokenizer=ByteTokenizer(), sha256="0")
    checkpoints = Checkpoints(RUN, Config(training=training), data, module, {}, None)
    checkpoints.best = best
    optimizer = SimpleNamespace(state={}, param_groups=[{"lr": 1.0}])
    trainer = SimpleNamespace(optimizers=[optimizer], is_global_zero=True)
    trainer.save_checkpoint = lambda path: save_checkpoint(
        saved_state(trainer.global_step, keep), path
    )
    for step in SAVES:
        trainer.global_step = step
        if step >= first and step in LOSSES:
            module.progress.validation = {"loss": LOSSES[step]}
            checkpoints.on_validation_end(trainer, module)
        elif step >= first:
            checkpoints.on_step(trainer, module)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_point_of_any_save_loses_no_interval_and_no_name(tmp_path, keep, monkeypatch):
    """Repaired and resumed after each, a run ends with the files of one that was never killed."""
    save_from(0, None, keep)
    whole = contents()
    assert whole["final.ckpt"] == whole["best.ckpt"] == (12, 0.5)
    inodes = {(CHECKPOINTS / name).stat().st_ino for name in ("last.ckpt", "final.ckpt")}
    assert len(inodes) == (2 if keep == 1 else 1)  # of keep=1, not everything is one file
    for event in range(1, 100):
        folder = tmp_path / str(event)
        (folder / "checkpoints").mkdir(parents=True)
        with monkeypatch.context() as patches:
            patches.chdir(folder)
            try:
                with monkeypatch.context() as deadly:
                    Killer(deadly, event, "replace", "link", "unlink")
                    save_from(0, None, keep)
            except Killed:
                saved = SavedRun(RUN)
                newest = saved.newest.step if saved.newest else 0
                if saved.newest:
                    saved.repair(keep)
                best = LOSSES.get(newest)
                assert contents().get("best.ckpt", (0, None))[1] == best
                assert ("final.ckpt" in contents()) == (newest == 12)
                save_from(newest + 1, best, keep)
                assert contents() == whole, event
            else:
                break
    assert event > 14


# ---- a finished run ----


def resume(config: Config | None = None) -> ResumePoint | None:
    """Resume as the config of `resumable_checkpoint` does, or as another."""
    metadata = resumable_checkpoint(12)["kit"]
    own = Previous.from_metadata(metadata, "x").config
    return find_resume_point(RUN, config or own, "0", HARDWARE)


def test_a_run_killed_before_its_verdict_is_not_called_finished():
    """It has all steps, but no final.ckpt yet, or it was killed in its verdict."""
    write("last.ckpt", 12, 1.0)
    point = resume()
    assert (point.step, point.verdict_only, point.best) == (12, True, 1.0)
    RUN.mark_running()
    assert resume().verdict_only
    RUN.mark_finished()
    with pytest.raises(UserError, match="is finished: 12 of 12 steps"):
        resume()


def test_a_run_that_another_length_would_end_has_no_verdict():
    """Stopped at step 6 of 12 and asked for 6: nobody has validated step 6."""
    write("last.ckpt", 6)
    RUN.mark_running()
    config = Previous.from_metadata(resumable_checkpoint(6)["kit"], "x").config
    with pytest.raises(UserError, match="is finished: 6 of 6 steps"):
        resume(config.with_max_steps(6))


# ---- moving aside ----


def test_a_move_aside_that_a_kill_interrupts_is_finished_at_the_next_start(tmp_path, monkeypatch):
    """Otherwise the run would resume from what is left of the old one."""
    for event in range(1, 20):
        folder = tmp_path / str(event)
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "logs").mkdir()
        with monkeypatch.context() as patches:
            patches.chdir(folder)
            for path in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "logs/metrics.csv"):
                Path(path).write_text(path)
            try:
                with monkeypatch.context() as deadly:
                    Killer(deadly, event, "replace", "rename", "mkdir", "unlink")
                    RUN.move_aside()
            except Killed:
                begun = (CHECKPOINTS / RUN.MOVING).exists()
                if begun:
                    assert read_previous(RUN) is None
                RUN.finish_moving()
                moved = not (CHECKPOINTS / "last.ckpt").exists()
                assert moved == begun
                names = {"last.ckpt", "best.ckpt", "metrics.csv"}
                assert {p.name for p in Path().glob("*/old-*/*")} == (names if moved else set())
                assert len({p.name for p in Path().glob("*/old-*")}) == moved
            else:
                break
    assert event > 6
