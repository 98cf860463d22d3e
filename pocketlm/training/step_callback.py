"""A Lightning callback that sees optimizer steps."""

from typing import Any

import lightning as L


class StepCallback(L.Callback):
    """Calls `on_step(trainer, module)` once an optimizer step, after it, however many batches a step has."""

    stepped = -1  # the step that on_step was last called for

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.stepped = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step > self.stepped:
            self.stepped = trainer.global_step
            self.on_step(trainer, module)

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        raise NotImplementedError

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, module, "fit")  # Lightning calls it only where all went well
