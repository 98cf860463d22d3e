"""Stopping cleanly on SIGINT and SIGTERM."""

import os
import signal
from typing import Any

import lightning as L

from pocketlm.checkpoint.runs import print_note
from pocketlm.training.checkpointing import Checkpoints
from pocketlm.training.step_callback import StepCallback


class GracefulStop(StepCallback):
    """On SIGINT or SIGTERM finish the step, save it as last.ckpt and end with status 128 + signal; a second one ends at once."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints, self.signal = checkpoints, 0
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _note(self, number: int, _: Any) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.checkpoints.training.validates(
            trainer.global_step
        ):  # else once the validation is in the books
            self.stop_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.stop_if_asked(trainer)

    def stop_if_asked(self, trainer: L.Trainer) -> None:
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(
            bool(self.signal), all=False
        ):
            self.signal = (
                self.signal or signal.SIGTERM
            )  # one process was asked: all stop at the same step
        if self.signal and trainer.global_step < self.checkpoints.training.max_steps:
            self.checkpoints.save(trainer, "last.ckpt")
            print_note(
                f"stopped at step {trainer.global_step}; the same command continues from {self.checkpoints.run.checkpoints / 'last.ckpt'}"
            )
            raise SystemExit(128 + self.signal)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
