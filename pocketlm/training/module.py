"""Interfaces between the module in train.py, the loop and the callbacks.

`TrainableModule` names the attributes of the module that `fit` and the callbacks use,
`TrainingProgress` holds the counters and results, and `StepCallback` is a callback that runs once
per optimizer step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from model import Transformer
from pocketlm.config.sections import Config
from pocketlm.distributed.sharding import ShardedStrategy, divide
from pocketlm.optim import WeightAverage


class StepCallback(L.Callback):
    """Calls `on_step(trainer, module)` after each optimizer step.

    Lightning's `on_train_batch_end` runs after each micro-batch; a step has `grad_accum_steps`
    of them.
    """

    last_step = -1  # the step for which on_step was last called

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step > self.last_step:
            self.last_step = trainer.global_step
            self.on_step(trainer, module)

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        raise NotImplementedError

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, module, "fit")  # Lightning itself calls it only on success


def zero_count() -> Tensor:
    return torch.zeros((), dtype=torch.long)


@dataclass
class TrainingProgress:
    """Counters of the current interval, and the latest results.

    An interval is the steps between two logged points. Its sums are tensors on the training
    device, one pair in each process: `add` only queues work, while reading them waits for the
    device and adds up the processes. `Checkpoints` saves the progress, so that a resumed run logs
    the numbers of the uninterrupted one.
    """

    tokens_seen: int = 0  # targets trained on, up to the last logged point
    validation: dict[str, float] = field(default_factory=dict)  # loss, bpb, perplexity
    validated_tokens: int = 0  # targets trained on before the latest validation
    grad_norm: Tensor = field(default_factory=lambda: torch.zeros(()))  # before clipping
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))  # nats
    targets: Tensor = field(default_factory=zero_count)
    # of each micro-batch of the current step: summed loss (nats), targets, input ids
    step: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    resumed_targets: int = 0  # of the current interval, counted before the run was interrupted
    total: Callable[[Tensor], Tensor] = lambda count: count  # sum over all processes
    saved: dict[str, Any] = field(default_factory=dict)  # state of the checkpoint to resume from
    has_saved_sums: bool = False  # in the first process; they are those of all processes

    def begin(
        self, device: torch.device, total: Callable[[Tensor], Tensor], first_process: bool
    ) -> None:
        """Put the counters on `device`, zero or, on a resume, at their saved values."""
        self.total = total
        self.loss_sum = torch.zeros((), device=device)
        self.targets = torch.zeros((), dtype=torch.long, device=device)
        self.has_saved_sums = first_process
        if self.saved:
            self.restore(self.saved)

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over a checkpoint's state: before `begin`, or, with FSDP, after it."""
        self.saved = saved
        self.tokens_seen, self.validation = saved["tokens_seen"], saved["validation"]
        self.resumed_targets = saved["targets"]
        self.validated_tokens = self.tokens_seen + self.resumed_targets
        if self.has_saved_sums:
            self.loss_sum.fill_(saved["nats"])
            self.targets.fill_(saved["targets"])

    def add(self, loss_sum: Tensor, targets: Tensor, input_ids: Tensor) -> None:
        """Add a micro-batch to the step: its summed loss in nats, number of targets and ids."""
        self.step.append((loss_sum, targets, input_ids))

    def end_step(self, *, applied: bool) -> None:
        """Count the micro-batches of the step, unless the step was left out."""
        for loss_sum, targets, _ in self.step if applied else ():
            self.loss_sum += loss_sum
            self.targets += targets
        self.step = []

    def interval(self) -> tuple[float, int]:
        """Return the summed loss (nats) and the number of targets of the interval so far."""
        return self.total(self.loss_sum).item(), int(self.total(self.targets))

    def take_interval(self) -> tuple[float, int]:
        """Return the interval's summed loss and number of targets, and begin the next interval."""
        loss_sum, targets = self.interval()
        self.loss_sum.zero_()
        self.targets.zero_()
        self.tokens_seen += targets
        return loss_sum, targets

    def tokens_so_far(self) -> int:
        """Return the number of targets trained on, including the current interval."""
        return self.tokens_seen + int(self.total(self.targets))

    def state(self) -> dict[str, Any]:
        """Return a checkpoint's `interval` entry."""
        loss_sum, targets = self.interval()
        return {
            "nats": loss_sum,
            "targets": targets,
            "tokens_seen": self.tokens_seen,
            "validation": self.validation,
        }


class TrainableModule(L.LightningModule):
    """A model, its loss and its progress; train.py's `LitTransformer` trains it."""

    config: Config
    model: Transformer
    progress: TrainingProgress
    average: WeightAverage
    train_loss_fn: Callable[[dict[str, Tensor]], Tensor]  # loss_sum, or its compiled version

    def configure_model(self) -> None:
        """Divide the model among the processes, if the strategy is FSDP."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            divide(self.model, strategy.device_mesh, strategy.root_device)

    def loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the summed cross-entropy of the batch's targets, in nats."""
        raise NotImplementedError


def non_finite(problem: str, step: int, rate: float, peak: float, place: str = "") -> str:
    """Return the message for a value that is not finite.

    rate: learning rate of the step. peak: `training.lr`. place: a sentence on where the step's
    documents are.
    """
    return (
        f"{problem} at step {step}, with the learning rate {rate:.3g}; training has stopped and "
        f"the checkpoints on disk are from before. {place}A smaller rate may mend it, from the "
        f"last checkpoint on: --change training.lr={peak / 2:.2g} (or training.warmup_steps, "
        "training.grad_clip, training.precision=32-true); training.on_nonfinite=skip leaves such "
        "steps out"
    )
