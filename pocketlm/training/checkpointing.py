"""Saving a run: its checkpoints, what they hold besides Lightning's state, and the random state.

Files in the run's checkpoint folder: `step-N.ckpt` (the newest `keep_checkpoints` of them),
`last.ckpt` (the newest), `best.ckpt` (the lowest validation loss) and `final.ckpt` (max_steps).
"""

import math
import random
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from model import Transformer
from pocketlm.checkpoint.format import checkpoint_metadata, read_checkpoint, save_checkpoint
from pocketlm.checkpoint.runs import Run
from pocketlm.config.sections import Config
from pocketlm.data.prepare import PreparedData
from pocketlm.errors import UserError
from pocketlm.files import link_or_copy
from pocketlm.training.metrics import non_finite
from pocketlm.training.module import StepCallback, TrainingProgress


class Checkpoints(StepCallback):
    """Saves every `save_every_steps`, at a new lowest validation loss, and at the last step.

    A step that is also validated is saved after its validation.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        data: PreparedData,
        model: Transformer,
        progress: TrainingProgress,
    ):
        self.run, self.config, self.training = run, config, config.training
        self.tokenizer_state, self.data_sha256 = data.tokenizer.state(), data.sha256
        self.model, self.progress = model, progress
        self.best: float | None = None  # the lowest validation loss

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the `kit` entry, which infer.py and the other commands read, and the progress."""
        progress = self.progress.state()
        checkpoint["kit"] = checkpoint_metadata(
            self.config,
            self.tokenizer_state,
            tokens=progress["tokens_seen"] + progress["targets"],
            val_loss=self.progress.validation.get("loss"),
            data_sha256=self.data_sha256,
        )
        checkpoint["interval"] = progress

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.progress.saved = checkpoint["interval"]

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self.training.steps:
            trainer.should_stop = True  # Lightning then validates before it ends
        elif step % self.training.save_every_steps == 0 and not self.training.validates(step):
            self.save(trainer, "last.ckpt")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        loss, step = self.progress.validation["loss"], trainer.global_step
        names = []
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best = loss
            names.append("best.ckpt")
        if step == self.training.steps:
            names.append("final.ckpt")
        if names or step % self.training.save_every_steps == 0:
            self.save(trainer, "last.ckpt", *names)

    def save(self, trainer: L.Trainer, *names: str) -> None:
        """Save this step under its number and under `names`, and delete old numbered ones.

        Raises UserError, and saves nothing, if a parameter is not finite.
        """
        path = self.run.checkpoints / f"step-{trainer.global_step:08d}.ckpt"
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise UserError(non_finite(name, trainer.global_step))
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for name in names:
                link_or_copy(path, self.run.checkpoints / name)
            if self.training.keep_checkpoints:
                for old in self.run.numbered()[self.training.keep_checkpoints :]:
                    old.unlink()


class RandomState(L.Callback):
    """Saves and restores the random state, which Lightning does not; dropout draws from it.

    The saved state is the first process's. The other processes must drop other activations, so
    they are seeded by rank, and by step, so that a resumed run does not repeat its masks.
    """

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_rank > 0:
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
    """Reads and writes Lightning's checkpoints atomically, checked, and with plain types only."""

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
