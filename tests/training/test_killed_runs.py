"""Runs that are killed, again and again, and what the same command then makes of them."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from pocketlm.checkpoint.format import read_checkpoint, save_checkpoint
from pocketlm.errors import UserError
from tests.support.training import TINY, end_equal, rows_without_timing, run, run_stopped_after

COMMAND = ("--config", "config.yaml", *TINY)


@pytest.mark.parametrize("name", ["best.ckpt", "final.ckpt", "loss.png"])
def test_a_run_killed_after_its_last_step_ends_with_all_names_and_its_verdict(
    folder, finished_folder, forked_commands, name
):
    killed = forked_commands.run(name, "12", *COMMAND, program="tests/programs/killed_train.py")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path("checkpoints", name).exists() or name == "best.ckpt"
    again = forked_commands.run(*COMMAND)
    assert again.returncode == 0, again.stderr
    assert "the run has ended; what is missing is the verdict" in again.stderr
    assert "Done: 12 steps" in again.stdout and "this model" in again.stdout
    whole = finished_folder / "checkpoints"
    assert end_equal("checkpoints", whole)
    for other in ("best.ckpt", "last.ckpt"):
        assert read_checkpoint(f"checkpoints/{other}")["global_step"] == 12
    assert Path("checkpoints/loss.png").exists()
    assert rows_without_timing("logs/metrics.csv") == rows_without_timing(
        finished_folder / "logs/metrics.csv"
    )
    third = forked_commands.run(*COMMAND)
    assert third.returncode == 2 and "is finished: 12 of 12 steps" in third.stderr


def test_a_run_that_falls_back_behind_a_nan_ends_as_the_uninterrupted_one(
    folder, finished_folder, capsys
):
    run_stopped_after(8)
    state = read_checkpoint("checkpoints/last.ckpt")
    state["state_dict"]["model.norm.weight"][3] = float("nan")
    for path in ("checkpoints/last.ckpt", "checkpoints/step-00000008.ckpt"):
        Path(path).unlink()
        save_checkpoint(state, Path(path))
    run()
    output = capsys.readouterr().err
    assert "model.norm.weight is not finite: going back to checkpoints/step-00000006.ckpt" in output
    assert end_equal("checkpoints", finished_folder / "checkpoints")
    assert read_checkpoint("checkpoints/best.ckpt")["global_step"] == 12


def test_the_best_model_before_a_resume_stays_the_best(folder):
    run_stopped_after(6)
    state = read_checkpoint("checkpoints/best.ckpt")
    state["kit"]["val_loss"] = 0.01
    for name in ("best.ckpt", "step-00000005.ckpt"):
        save_checkpoint(state, Path("checkpoints", name))
    run()
    assert read_checkpoint("checkpoints/best.ckpt")["global_step"] == 5


@pytest.mark.parametrize("entry", ["loops", "a counter", "optimizer_states"])
def test_a_state_that_lightning_or_torch_cannot_restore_is_a_sentence(folder, entry):
    """Lightning takes a counter that is missing for zero, and says nothing."""
    run_stopped_after(4)
    state = read_checkpoint("checkpoints/last.ckpt")
    if entry == "loops":
        del state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    elif entry == "a counter":
        del state["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    else:
        state["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(3)
    for path in ("checkpoints/last.ckpt", "checkpoints/step-00000004.ckpt"):
        save_checkpoint(state, Path(path))
    with pytest.raises(UserError, match=r"has no state of a run that can be restored .*remove it"):
        run()


def test_a_run_made_longer_ends_as_one_that_was_as_long_from_the_start(folder):
    """With dropout. A schedule that does not depend on the length; others follow the new one."""
    constant = "training.schedule=constant"
    run("run.name=long", constant)
    run("run.name=raised", constant, "training.max_steps=6")
    run("run.name=raised", constant)
    assert end_equal("checkpoints/raised", "checkpoints/long")
    history = read_checkpoint("checkpoints/raised/final.ckpt")["kit"]["history"]
    assert history == [{"step": 6, "changes": ["training.max_steps: 6 -> 12"]}]


def test_a_run_made_longer_and_stopped_ends_as_one_made_longer(folder):
    for name in ("whole", "stopped"):
        run(f"run.name={name}", "training.max_steps=4")
    run_stopped_after(9, "run.name=stopped")
    for name in ("whole", "stopped"):
        run(f"run.name={name}")
    assert end_equal("checkpoints/whole", "checkpoints/stopped")


# ---- the soak ----

# On demand: SOAK_STEPS=20000 SOAK_KILLS=50 pytest -n 0 tests/training/test_killed_runs.py -k soak
STEPS = int(os.environ.get("SOAK_STEPS", "900"))
KILLS = int(os.environ.get("SOAK_KILLS", "5"))
SOAK = [
    "model.n_layers=1",
    "model.d_model=8",
    "training.seq_len=8",
    "training.micro_batch_size=2",
    "training.grad_accum_steps=1",
    "training.optimizer=adamw",
    "training.schedule=cosine",
    "training.ema_decay=0.99",
    f"training.max_steps={STEPS}",
    "training.val_every_steps=300",
    "training.save_every_steps=40",
    "training.log_every_steps=100",
    "sampling.max_new_tokens=1",
]


@pytest.mark.timeout(max(600, STEPS))
def test_soak_a_run_killed_at_random_steps_ends_as_one_that_never_was(folder, forked_commands):
    """Some 2,000 steps, with dropout and an average, by SIGKILL and SIGTERM; more on demand."""
    generator, step, interruptions = random.Random(STEPS), 0, 0
    whole = forked_commands.run(*COMMAND, *SOAK, "run.name=whole")
    assert whole.returncode == 0, whole.stderr
    while step < STEPS:
        number = generator.choice([signal.SIGKILL, signal.SIGTERM])
        at = min(STEPS + 1, step + generator.randint(1, 2 * STEPS // KILLS))
        done = forked_commands.run(*COMMAND, *SOAK, "run.name=killed", interrupt=(at, number))
        assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGTERM), done.stderr
        interruptions += done.returncode != 0
        step = read_checkpoint("checkpoints/killed/last.ckpt")["global_step"]
        assert at - step <= 40  # all of them, if the kill comes between a step and its save
    assert interruptions >= KILLS // 2
    assert end_equal("checkpoints/killed", "checkpoints/whole")
    assert rows_without_timing("logs/killed/metrics.csv") == rows_without_timing(
        "logs/whole/metrics.csv"
    )
