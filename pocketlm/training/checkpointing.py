"""Saving a run: its checkpoints, what they hold besides Lightning's state, and the random state.

Files in the run's checkpoint folder: `step-N.ckpt` (the newest `keep_checkpoints` of them),
`last.ckpt` (the newest), `best.ckpt` (the lowest validation loss) and `final.ckpt` (the last step).
"""

import math
import random
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from pocketlm.checkpoint.format import (
    WEIGHT_PREFIX,
    checkpoint_metadata,
    read_checkpoint,
    save_checkpoint,
)
from pocketlm.checkpoint.resume import ResumePoint
from pocketlm.checkpoint.runs import Run
from pocketlm.checkpoint.validation import non_finite_problem
from pocketlm.config.sections import Config
from pocketlm.data.loaders import rows_per_step
from pocketlm.data.prepare import PreparedData
from pocketlm.errors import UserError
from pocketlm.hardware.processes import print_note
from pocketlm.training.module import StepCallback, TrainableModule, non_finite


class Checkpoints(StepCallback):
    """Saves every `save_every_steps`, at a new lowest validation loss, and at the last step.

    A step that is also validated is saved after its validation.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        data: PreparedData,
        module: TrainableModule,
        hardware: dict[str, Any],
        start: ResumePoint | None,
    ):
        self.run, self.config, self.training = run, config, config.training
        self.tokenizer_state, self.data_sha256 = data.tokenizer.state(), data.sha256
        self.model, self.progress, self.average = module.model, module.progress, module.average
        self.hardware = hardware  # from `describe_hardware`
        self.history = [*start.history] if start else []
        # the lowest validation loss: that of best.ckpt, and not that of a file that is lost
        self.best = start.best if start else None
        self.waited = start.waited if start else 0  # validations in a row without a new best
        self.restored = start is None  # whether a resumed run has got as far as its first step

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

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
            hardware=self.hardware,
            history=self.history,
            waited=self.waited,
        )
        checkpoint["interval"] = progress

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.progress.restore(checkpoint["interval"])
        count_in_own_batches(checkpoint, self.config)
        # Lightning takes a missing counter for zero, and would accumulate other micro-batches
        if checkpoint.get("pytorch-lightning_version") == L.__version__:
            expected = trainer.fit_loop.state_dict()
            if missing := first_missing_key(expected, checkpoint["loops"]["fit_loop"]):
                raise ValueError(f"its loops have no {missing}")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        for parameter, state in trainer.optimizers[0].state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"the optimizer's {name} has the shape {tuple(value.shape)}")
        self.restored = True

    def restore_finished(self, path: Path) -> None:
        """Restore the weights and results of a run that has taken all steps."""
        state = read_checkpoint(path)
        weights = {
            name.removeprefix(WEIGHT_PREFIX): tensor for name, tensor in state["state_dict"].items()
        }
        self.model.load_state_dict(weights)
        self.progress.restore(state["interval"])
        self.progress.begin(torch.device("cpu"), lambda count: count, first_process=True)

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self.training.steps:
            trainer.should_stop = True  # Lightning then validates before it ends
        elif step % self.training.save_every_steps == 0 and not self.training.validates(step):
            self.save(trainer, "last.ckpt")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        loss, step = self.progress.validation["loss"], trainer.global_step
        names = []
        self.waited += 1
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best, self.waited = loss, 0
            names.append("best.ckpt")
        if self.training.has_ended(step, self.waited):
            names.append("final.ckpt")
            trainer.should_stop = True
        if names or step % self.training.save_every_steps == 0:
            self.save(trainer, "last.ckpt", *names)

    def save(self, trainer: L.Trainer, *names: str) -> None:
        """Save this step under its number and under `names`, and delete old numbered ones.

        Raises UserError, and saves nothing, if a parameter or a state of the optimizer is not
        finite. What a kill leaves undone here is done at the next start: see `SavedRun`.
        """
        path = self.run.checkpoints / f"step-{trainer.global_step:08d}.ckpt"
        optimizer = trainer.optimizers[0]
        states = {"optimizer": [*optimizer.state.values()]}
        if problem := non_finite_problem(
            {"state_dict": dict(self.model.named_parameters()), "optimizer_states": states}
        ):
            rate = optimizer.param_groups[0]["lr"]
            raise UserError(non_finite(problem, trainer.global_step, rate, self.training.lr))
        path.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed under the run
        validating = self.average.in_model
        self.average.place(optimizer, in_model=True)
        trainer.save_checkpoint(path)
        self.average.place(optimizer, in_model=validating)
        if trainer.is_global_zero:
            keep = self.training.keep_checkpoints
            for name in names:
                self.run.give_name(path, name, only=keep == 1)
            self.run.prune(keep)


def count_in_own_batches(checkpoint: dict[str, Any], config: Config) -> None:
    """Count a checkpoint's batches as this run has them on each device: its steps stay the same."""
    loop, step = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]
    batches = step * config.on_each_device().training.grad_accum_steps
    for counts in (loop["epoch_loop.batch_progress"][name] for name in ("total", "current")):
        behind = counts["processed"] - counts["completed"]  # 1 in a save before the batch's end
        counts |= dict.fromkeys(("ready", "started", "processed"), batches)
        counts["completed"] = batches - behind
    [loader] = loop["state_dict"]["combined_loader"]
    if "handed_out" in loader:  # of earlier versions: the batches of each device
        del loader["handed_out"]
        loader["rows"] = step * rows_per_step(config)


def first_missing_key(expected: dict[str, Any], actual: Any) -> str | None:
    """Return the first key of nested dicts that `actual` lacks; None if it has all.

    >>> first_missing_key({"a": {"b": 1}}, {"a": {}, "c": 2}), first_missing_key({}, {"c": 2})
    ('b', None)
    """
    for key, value in expected.items():
        if not isinstance(actual, dict) or key not in actual:
            return key
        if isinstance(value, dict) and (missing := first_missing_key(value, actual[key])):
            return missing
    return None


class RandomState(L.Callback):
    """Saves and restores the random state, which Lightning does not; dropout draws from it.

    The state of every process is saved. With another number of processes, each is seeded by rank,
    and by step, so that dropout's masks do not repeat.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.restored: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the random states. With several processes, all of them have to call this."""
        own, ranks = self._own_state(), [self._own_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, own)
        return own if len(ranks) == 1 else ranks[0] | {"ranks": ranks[1:]}

    @staticmethod
    def _own_state() -> dict[str, Any]:
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        if torch.backends.mps.is_available():
            state["mps"] = torch.mps.get_rng_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        rank, count = trainer.global_rank, trainer.world_size
        states = [self.restored, *self.restored.get("ranks", [])] if self.restored else []
        if len(states) == count:
            self._restore(states[rank])
            return
        if states and module.hparams["model"]["dropout"]:
            print_note(
                f"the run had {len(states)} devices and has {count}: from here on dropout draws "
                "other masks than an uninterrupted run"
            )
        if states or rank:
            torch.manual_seed(self.seed + 1_000_003 * rank + trainer.global_step)

    @staticmethod
    def _restore(state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        if "mps" in state and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state["mps"])


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
