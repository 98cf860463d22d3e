"""Several processes: the weights of one process with as many rows, and an exact resume."""

import signal
import subprocess

import pytest
import torch

from pocketlm.checkpoint.format import read_checkpoint
from tests.support.forked_commands import ForkedCommands
from tests.support.training import STREAM, TINY, end_equal, run


@pytest.fixture
def run_two(folder, forked_commands: ForkedCommands):
    """Run train.py's command, from which Lightning starts the second process."""

    def run_two(
        *overrides: str, interrupt: tuple[int, int] | None = None
    ) -> subprocess.CompletedProcess:
        command = ["--config", "config.yaml", *TINY, "hardware.devices=2", *overrides]
        program = "tests/programs/train_in_two.py"
        return forked_commands.run(*command, program=program, interrupt=interrupt)

    return run_two


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one_with_twice_the_rows(run_two):
    """Two CPU processes see the rows of one, in another grouping, with unequal targets."""
    options = ["model.dropout=0", "training.optimizer=adamw", "training.max_steps=6"]
    run("run.name=one", *options)
    done = run_two(*options, "run.name=two", "training.micro_batch_size=2")
    assert done.returncode == 0, done.stderr
    one, two = (read_checkpoint(f"checkpoints/{name}/final.ckpt") for name in ("one", "two"))
    assert two["kit"]["tokens"] == one["kit"]["tokens"]
    assert two["kit"]["val_loss"] == pytest.approx(one["kit"]["val_loss"], abs=1e-4)
    for name in one["state_dict"]:  # sums in another order, magnified by AdamW's division
        torch.testing.assert_close(
            two["state_dict"][name], one["state_dict"][name], atol=2e-5, rtol=1e-4
        )


@pytest.mark.slow
def test_two_processes_on_a_stream_stop_and_end_as_the_uninterrupted_ones(run_two):
    """Each has its own documents, and its own position in them; one of them writes the checkpoint.

    Without data workers: CPython 3.11 can hang in the fork that starts one while torch's threads
    come and go.
    """
    options = [*STREAM, "hardware.num_workers=0"]
    whole = run_two("run.name=whole", *options)
    assert whole.returncode == 0, whole.stderr
    stopped = run_two("run.name=stopped", *options, interrupt=(8, signal.SIGTERM))
    assert stopped.returncode == 128 + signal.SIGTERM
    assert read_checkpoint("checkpoints/stopped/last.ckpt")["global_step"] == 8
    again = run_two("run.name=stopped", *options)
    assert again.returncode == 0, again.stderr
    assert "resuming from checkpoints/stopped/last.ckpt at step 8" in again.stderr
    assert end_equal("checkpoints/stopped", "checkpoints/whole")
