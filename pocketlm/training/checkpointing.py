"""Checkpoints of a run, and the random state in them."""

import math
import random
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from pocketlm.checkpoint.format import read_checkpoint, save_checkpoint
from pocketlm.checkpoint.runs import Run
from pocketlm.config.sections import TrainingConfig
from pocketlm.errors import UserError
from pocketlm.files import link_or_copy
from pocketlm.training.metrics import non_finite
from pocketlm.training.step_callback import StepCallback


class Checkpoints(StepCallback):
    """step-N.ckpt every `save_every_steps`, the newest few kept; last.ckpt the newest, best.ckpt that of the lowest
    validation loss, final.ckpt the one at max_steps. A step that is also validated is saved after its validation.
    """

    def __init__(self, run: Run, training: TrainingConfig):
        self.run, self.training = run, training
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self.training.max_steps:
            trainer.should_stop = True  # Lightning then validates before it ends
        elif step % self.training.save_every_steps == 0 and not self.training.validates(step):
            self.save(trainer, "last.ckpt")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        loss, step = module.validation["loss"], trainer.global_step
        names = []
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best = loss
            names.append("best.ckpt")
        if step == self.training.max_steps:
            names.append("final.ckpt")
        if names or step % self.training.save_every_steps == 0:
            self.save(trainer, "last.ckpt", *names)

    def save(self, trainer: L.Trainer, *names: str) -> None:
        """Save this step under its number and under `names`, and prune the numbered ones."""
        path = self.run.checkpoints / f"step-{trainer.global_step:08d}.ckpt"
        for name, p in trainer.lightning_module.model.named_parameters():
            if not torch.isfinite(p).all():
                raise UserError(non_finite(name, trainer.global_step))
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for name in names:
                link_or_copy(path, self.run.checkpoints / name)
            if self.training.keep_checkpoints:
                for old in self.run.numbered()[self.training.keep_checkpoints :]:
                    old.unlink()


class RandomState(L.Callback):
    """Lightning saves no random state; dropout needs torch's on a resume. The state saved is that of the first process."""

    def __init__(self, seed: int):
        self.seed = seed
        self.restored: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        if torch.backends.mps.is_available():
            state["mps"] = torch.mps.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = state

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (
            trainer.global_rank > 0
        ):  # other processes drop other numbers, and after a resume new ones
            torch.manual_seed(self.seed + 1_000_003 * trainer.global_rank + trainer.global_step)
            return
        if not self.restored:
            return
        random.setstate(self.restored["python"])
        torch.set_rng_state(self.restored["torch"])
        if "cuda" in self.restored and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.restored["cuda"])
        if "mps" in self.restored and torch.backends.mps.is_available():
            torch.mps.set_rng_state(self.restored["mps"])


class DurableCheckpointIO(CheckpointIO):
    """Lightning's way to the disk: whole files, checked when read, plain types only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
