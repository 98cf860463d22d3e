"""Graceful stop of a training run on SIGINT (Ctrl-C) and SIGTERM.

- First signal: the run finishes the current optimizer step (and the validation, if the step is
  validated), saves it as last.ckpt and exits with status 128 + the signal's number: 130 for SIGINT,
  143 for SIGTERM. The same command resumes from last.ckpt and ends with the weights of an
  uninterrupted run.
- Second signal: the process exits at once with the same kind of status; the steps since the last
  saved checkpoint are lost.
- A signal after the last step has no effect, since the run is about to end anyway.
- With several processes, a signal to one of them stops all of them at the same step.
"""

import os
import signal
from typing import Any

import lightning as L

from pocketlm.hardware.processes import print_note
from pocketlm.training.checkpointing import Checkpoints
from pocketlm.training.module import StepCallback


class GracefulStop(StepCallback):
    """Signal handlers that are installed while the model trains."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.signal = 0  # the number of the first signal received
        self.previous_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.previous_handlers = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _receive(self, number: int, _: Any) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        os.write(2, b"\nstopping after this step; a second signal stops at once\n")

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.checkpoints.training.validates(trainer.global_step):
            self.stop_if_signalled(trainer)  # otherwise in on_validation_end, to save its loss too

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.stop_if_signalled(trainer)

    def stop_if_signalled(self, trainer: L.Trainer) -> None:
        """Save this step and raise SystemExit if any process has received a signal."""
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(
            bool(self.signal), all=False
        ):
            self.signal = self.signal or signal.SIGTERM
        if self.signal and trainer.global_step < self.checkpoints.training.steps:
            self.checkpoints.save(trainer, "last.ckpt")
            path = self.checkpoints.run.checkpoints / "last.ckpt"
            print_note(
                f"stopped at step {trainer.global_step}; the same command resumes from {path}"
            )
            raise SystemExit(128 + self.signal)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}
