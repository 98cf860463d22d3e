"""A gradient that is not finite: the run stops or leaves the step out; neither is a dead end."""

import json
from pathlib import Path

import pytest
import torch

import train
from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.errors import UserError
from pocketlm.training.metrics import loss_before_spike
from tests.support.training import (
    are_equal,
    read_rows,
    run,
    run_stopped_after,
    weights_and_optimizer,
)


@pytest.fixture
def bad_steps(monkeypatch):
    """Return a set of steps whose loss is NaN, in the first of their two micro-batches."""
    steps: set[int] = set()
    original = train.LitTransformer.loss_sum

    def loss_sum(self, batch):
        loss = original(self, batch)
        bad = self.training and self.trainer.global_step + 1 in steps and not self.progress.step
        return loss * float("nan") if bad else loss

    monkeypatch.setattr(train.LitTransformer, "loss_sum", loss_sum)
    return steps


def test_the_message_names_step_rate_and_documents_and_what_mends_it(folder, bad_steps):
    """The documents are the rows of the step's micro-batches, as text."""
    bad_steps.add(8)
    with pytest.raises(UserError) as error:
        run()
    message = str(error.value)
    assert "the gradient is not finite at step 8, with the learning rate 0.002;" in message
    assert "--change training.lr=0.002 " in message
    assert "training.on_nonfinite=skip" in message
    [path] = Path("checkpoints").glob("nonfinite-*")
    assert f"Its documents are in {path}." in message
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["micro_batch"] for row in rows] == [0] * 4 + [1] * 4
    assert str(rows[0]["loss"]) == "nan" and rows[-1]["loss"] > 0
    text = Path("text.txt").read_text()
    assert all(row["text"] in text for row in rows)


def test_a_nan_that_returns_at_each_resume_is_mended_by_another_learning_rate(
    folder, bad_steps, capsys
):
    """The change is kept in the history of the run, and its rate is the run's from then on."""
    bad_steps.add(8)
    for _ in range(2):
        with pytest.raises(UserError, match="not finite at step 8"):
            run()
    with pytest.raises(UserError, match=r"--change training.lr=VALUE"):
        run("training.lr=1e-3")
    bad_steps.clear()  # as a smaller rate would
    run(flags=("--change", "training.lr=1e-3"))
    kit = read_checkpoint("checkpoints/final.ckpt")["kit"]
    assert kit["history"] == [{"step": 6, "changes": ["training.lr: 0.004 -> 0.001"]}]
    assert kit["config"]["training"]["lr"] == 0.001
    rates = {int(row["step"]): float(row["train/lr"]) for row in read_rows() if row["train/lr"]}
    assert rates[8] == pytest.approx(1e-3 * (1 - 5 / 10), rel=1e-5)  # the schedule's fifth of ten


def test_a_step_that_is_skipped_changes_nothing_but_the_schedule(folder, bad_steps, capsys):
    """Weights and optimizer are those of the step before; nor is its loss counted."""
    options = ["training.on_nonfinite=skip", "training.save_every_steps=1", "training.max_steps=8"]
    keep = "training.keep_checkpoints=0"
    bad_steps.add(7)
    run(*options, keep)
    assert "step 7 is left out: the gradient is not finite" in capsys.readouterr().err
    before, after, next_step = (
        weights_and_optimizer(f"checkpoints/step-{step:08d}.ckpt") for step in (6, 7, 8)
    )
    assert are_equal(before, after)
    assert not are_equal(after, next_step)
    assert all(torch.isfinite(tensor).all() for tensor in next_step)
    losses = [float(row["train/loss"]) for row in read_rows() if row["train/loss"]]
    assert len(losses) == 5 and max(losses) < 7


def test_a_run_with_skipped_steps_resumes_exactly(folder, bad_steps):
    options = ["training.on_nonfinite=skip"]
    bad_steps |= {5, 8}
    run("run.name=whole", *options)
    run_stopped_after(8, "run.name=stopped", *options)
    run("run.name=stopped", *options)
    whole, stopped = (
        weights_and_optimizer(f"checkpoints/{name}/final.ckpt") for name in ("whole", "stopped")
    )
    assert are_equal(whole, stopped)


def test_skipping_has_an_end(folder, bad_steps, monkeypatch):
    """Ten steps in a row are no accident of the data."""
    monkeypatch.setattr("pocketlm.training.monitors.NonFiniteGuard.MAX_SKIPPED", 2)
    bad_steps |= {2, 4, 5, 7, 8, 9}
    with pytest.raises(UserError, match="not finite at step 9"):
        run("training.on_nonfinite=skip")


def test_a_state_of_the_optimizer_that_is_not_finite_is_not_saved(folder, monkeypatch):
    """Resuming from it would be a dead end."""
    original = train.LitTransformer.configure_gradient_clipping

    def clip(self, optimizer, *arguments, **keywords):
        original(self, optimizer, *arguments, **keywords)
        if self.trainer.global_step == 4:
            next(iter(optimizer.state.values()))["exp_avg_sq"][0] = float("inf")  # divides only

    monkeypatch.setattr(train.LitTransformer, "configure_gradient_clipping", clip)
    with pytest.raises(UserError, match=r"exp_avg_sq is not finite at step 5"):
        run()
    for path in Path("checkpoints").glob("*.ckpt"):
        assert all(torch.isfinite(tensor).all() for tensor in weights_and_optimizer(path))


def test_a_spike_of_the_training_loss_is_reported(folder, capsys, monkeypatch):
    """Worked by hand: the median of 3.0, 3.1, 2.9, 3.0, 3.0 is 3.0, and a fifth above it 3.6."""
    recent = [3.0, 3.1, 2.9, 3.0, 3.0]
    assert loss_before_spike(recent, 3.59) is None
    assert loss_before_spike(recent, 3.61) == 3.0
    assert loss_before_spike(recent[:4], 9.0) is None  # too few to tell
    original = train.LitTransformer.loss_sum

    def loss_sum(self, batch):
        loss = original(self, batch)
        return loss * (1.5 if self.training and self.trainer.global_step == 9 else 1)

    monkeypatch.setattr(train.LitTransformer, "loss_sum", loss_sum)
    run("training.log_every_steps=1")
    spikes = [line for line in capsys.readouterr().err.splitlines() if ", after " in line]
    assert len(spikes) == 1 and spikes[0].startswith("step 10")
