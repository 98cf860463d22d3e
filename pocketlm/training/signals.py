"""Graceful stop of a training run.

- A stop signal (SIGINT is Ctrl-C, SIGTERM, SIGHUP of a closed terminal, SIGUSR1, SIGUSR2, SIGXCPU),
  or a reader of stderr that has gone (SIGPIPE): the run finishes the current optimizer step (and
  the validation, if the step is validated), saves it as last.ckpt and exits with status 128 + the
  signal's number, for example 130 for SIGINT and 143 for SIGTERM. The same command resumes from
  last.ckpt and ends with the weights of an uninterrupted run.
- Under Slurm, SIGUSR1 also requeues the job, once, after the step has been saved.
- The second SIGINT or SIGTERM: the process exits at once with the same kind of status; the steps
  since the last saved checkpoint are lost.
- A signal after the last step has no effect, since the run is about to end anyway.
- With several processes, a signal to one of them stops all of them at the same step, with its
  status.

`StopSignals` in pocketlm/startup.py has the handler, which is installed before the imports.
"""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch

from pocketlm.hardware.processes import is_first_process, print_note
from pocketlm.startup import stop_signals
from pocketlm.training.checkpointing import Checkpoints
from pocketlm.training.module import StepCallback


class GracefulStop(StepCallback):
    """Saves the step and ends the run when a stop signal has been received."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        stop_signals.phase = "training"

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.checkpoints.training.validates(trainer.global_step):
            self.stop_if_signalled(trainer)  # otherwise in on_validation_end, to save its loss too

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.stop_if_signalled(trainer)

    def stop_if_signalled(self, trainer: L.Trainer) -> None:
        """Save this step and raise SystemExit if any process has received a signal."""
        number = stop_signals.received
        if trainer.world_size > 1:
            own = torch.tensor(number, device=trainer.strategy.root_device)
            highest = trainer.strategy.reduce(own, reduce_op="max")
            assert isinstance(highest, torch.Tensor)
            number = int(highest)
            if number:  # a signal that has come meanwhile is the next step's, and is not cleared
                stop_signals.received = number
        if number and trainer.global_step < self.checkpoints.training.steps:
            self.checkpoints.save(trainer, "last.ckpt")
            # Lightning kills the run 5 s after a process has left; the first one may still copy
            trainer.strategy.barrier()
            path = self.checkpoints.run.checkpoints / "last.ckpt"
            print_note(
                f"stopped at step {trainer.global_step}; the same command resumes from {path}"
            )
            raise SystemExit(128 + number)


@contextmanager
def owned_signals() -> Iterator[None]:
    """Handle the stop signals until the context ends; requeue a Slurm job that SIGUSR1 stopped."""
    with stop_signals.listening():
        try:
            yield
        except SystemExit:
            if stop_signals.received == getattr(signal, "SIGUSR1", None):
                requeue()
                if torch.distributed.is_available() and torch.distributed.is_initialized():
                    # srun may end the first process as soon as another one has left
                    torch.distributed.barrier()
            raise


def requeue() -> None:
    """Ask Slurm to run this job again. Nothing is done outside of a Slurm job."""
    job = os.environ.get("SLURM_JOB_ID")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    if job is None or not is_first_process():
        return
    if not re.fullmatch("[0-9]+(_[0-9]+)?", job):
        print_note(f"the Slurm job is {job!r}, which is no job number: submit it again yourself")
        return
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        problem = done.stderr.strip() if done.returncode else ""
        failed = done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        failed, problem = True, str(error)
    if failed:
        print_note(f"{' '.join(command)} failed ({problem}): submit the job again yourself")
    else:
        print_note(f"asked Slurm to run job {job} again")
