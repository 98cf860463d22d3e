"""Metrics of a run: the terminal, metrics.csv, TensorBoard."""

import csv
import math
import os
import time
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pocketlm.checkpoint.runs import Run
from pocketlm.config.loading import to_yaml
from pocketlm.config.sections import TrainingConfig
from pocketlm.errors import UserError
from pocketlm.hardware.measure import memory_in_use
from pocketlm.training.step_callback import StepCallback

CSV_COLUMNS = [
    "step",
    "tokens",
    "train/loss",
    "train/bpb",
    "train/lr",
    "train/grad_norm",
    "perf/tokens_per_second",
    "perf/memory_mb",
    "val/loss",
    "val/bpb",
    "val/perplexity",
    "probe/macro",
]


class MetricsLogger(StepCallback):
    """Scalars to TensorBoard and to metrics.csv, and the progress of the run to stderr."""

    def __init__(self, run: Run, training: TrainingConfig, bytes_per_token: float, first_step: int):
        self.run, self.training, self.bytes_per_token, self.first_step = (
            run,
            training,
            bytes_per_token,
            first_step,
        )
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.paused = 0.0  # seconds since the last log that were not training
        self.validation_start: float | None = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            self.console.quiet = True
            return
        trainer.logger.experiment.add_text(
            "config", "```yaml\n" + to_yaml(module.config) + "```", self.first_step
        )
        if self.console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(16),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(
                "", total=self.training.max_steps, completed=self.first_step, text=""
            )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if trainer.is_global_zero:
            self._cut_csv(
                self.first_step
            )  # not before: until here a resume may be refused, and nothing is to be lost
        self.start = self.last = time.perf_counter()
        self.start_step = trainer.global_step
        self.carried = module.resumed.get(
            "targets", 0
        )  # of the interval in hand, by the process before this one

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if (
            self.validation_start is not None
        ):  # all that surrounds a validation is over: the clock of training goes on
            self.paused += time.perf_counter() - self.validation_start
            self.validation_start = None

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step % self.training.log_every_steps and step not in (1, self.training.max_steps):
            return
        nats, targets = module.take_interval()  # waits for the device
        now = time.perf_counter()
        seconds = now - self.last - self.paused
        loss = nats / targets
        if not math.isfinite(loss):
            raise UserError(non_finite("the training loss", step))
        speed = (targets - self.carried) / seconds
        self.write(
            trainer,
            step,
            module.tokens_seen,
            {
                "train/loss": loss,
                "train/bpb": loss / math.log(2) / self.bytes_per_token,
                "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
                "train/grad_norm": float(module.grad_norm),
                "perf/tokens_per_second": speed,
                "perf/memory_mb": memory_in_use(module.device.type),
            },
        )
        text = f"loss {loss:.3f}  {speed:,.0f} tokens/s"
        if step > self.start_step + 1:  # the first step is not like the others
            done = (step - self.start_step) / (self.training.max_steps - self.start_step)
            text += f"  {as_clock((now - self.start) * (1 - done) / done)} left"
        self.say(step, text)
        self.last, self.carried, self.paused = now, 0, 0.0

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        values = module.validation
        self.write(
            trainer,
            trainer.global_step,
            module.tokens_so_far(),
            {f"val/{name}": value for name, value in values.items()},
        )
        self.say(
            trainer.global_step,
            f"validation loss {values['loss']:.4f}  bits per byte {values['bpb']:.4f}  perplexity {values['perplexity']:.1f}",
            always=True,
        )

    def write(self, trainer: L.Trainer, step: int, tokens: int, scalars: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        trainer.logger.log_metrics(scalars, step)
        with self.run.metrics_file.open("a", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(
                {"step": step, "tokens": tokens}
                | {name: f"{value:.6g}" for name, value in scalars.items()}
            )

    def say(self, step: int, text: str, always: bool = False) -> None:
        """On a terminal the bar moves; elsewhere a line is printed."""
        if self.bar is None:
            self.console.print(f"step {step}/{self.training.max_steps}  {text}", soft_wrap=True)
        elif always:
            self.bar.console.print(f"step {step}  {text}", soft_wrap=True)
        else:
            self.bar.update(self.task, completed=step, text=text)

    def _cut_csv(self, step: int) -> None:
        """Drop the rows beyond `step`: they were of progress that is lost and will be made again."""
        path = self.run.metrics_file
        if path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
            unfinished = path.with_suffix(".unfinished")
            with unfinished.open("w", newline="") as file:
                writer = csv.DictWriter(file, CSV_COLUMNS)
                writer.writeheader()
                writer.writerows(kept)
            os.replace(unfinished, path)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def non_finite(what: str, step: int) -> str:
    return (
        f"{what} is not finite at step {step}; training has stopped and the checkpoints on disk are from before. "
        "Lower training.lr or raise training.warmup_steps, and begin with --fresh or another run.name"
    )


def as_clock(seconds: float) -> str:
    """
    >>> as_clock(75), as_clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def tensorboard(run: Run, first_step: int) -> TensorBoardLogger:
    """TensorBoard's files straight in the run's log folder; points beyond `first_step` are taken back."""
    return TensorBoardLogger(
        run.logs,
        name="",
        version="",
        purge_step=first_step + 1 if first_step else None,
        default_hp_metric=False,
    )
