"""Several processes: the weights of one process with as many rows, and an exact resume."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pocketlm.checkpoint.format import read_checkpoint
from tests.support.training import STREAM, TINY, end_equal, run

ROOT = Path(__file__).parents[2]


def run_script(
    *overrides: str, interrupt: tuple[int, int] | None = None
) -> subprocess.CompletedProcess:
    """Run the command line, from which Lightning starts the second process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    program = ROOT / "train.py"
    if interrupt:
        program = ROOT / "tests/programs/interrupted_train.py"
        environment["INTERRUPT"] = "{} {}".format(*map(int, interrupt))
    command = [sys.executable, program, "--config", "config.yaml", *TINY, *overrides]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one_with_twice_the_rows(folder):
    """Two CPU processes see the rows of one, in another grouping, with unequal targets."""
    options = ["model.dropout=0", "training.optimizer=adamw", "training.max_steps=6"]
    run("run.name=one", *options)
    two_processes = ["hardware.devices=2", "training.micro_batch_size=2"]
    done = run_script(*options, "run.name=two", *two_processes)
    assert done.returncode == 0, done.stderr
    one, two = (read_checkpoint(f"checkpoints/{name}/final.ckpt") for name in ("one", "two"))
    assert two["kit"]["tokens"] == one["kit"]["tokens"]
    assert two["kit"]["val_loss"] == pytest.approx(one["kit"]["val_loss"], abs=1e-4)
    for name in one["state_dict"]:  # sums in another order, magnified by AdamW's division
        torch.testing.assert_close(
            two["state_dict"][name], one["state_dict"][name], atol=2e-5, rtol=1e-4
        )


@pytest.mark.slow
def test_two_processes_on_a_stream_stop_and_end_as_the_uninterrupted_ones(folder):
    """Each has its own documents, and its own position in them; one of them writes the checkpoint.

    Without data workers: CPython 3.11 can hang in the fork that starts one while torch's threads
    come and go.
    """
    options = [*STREAM, "model.dropout=0", "hardware.devices=2", "hardware.num_workers=0"]
    whole = run_script("run.name=whole", *options)
    assert whole.returncode == 0, whole.stderr
    stopped = run_script("run.name=stopped", *options, interrupt=(8, signal.SIGTERM))
    assert stopped.returncode == 128 + signal.SIGTERM
    assert read_checkpoint("checkpoints/stopped/last.ckpt")["global_step"] == 8
    again = run_script("run.name=stopped", *options)
    assert again.returncode == 0, again.stderr
    assert "resuming from checkpoints/stopped/last.ckpt at step 8" in again.stderr
    assert end_equal("checkpoints/stopped", "checkpoints/whole")
