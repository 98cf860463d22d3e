"""Metrics of a run: one line of text, one row of metrics.csv and TensorBoard points at a time.

Training metrics are logged every `log_every_steps`, and are means over the steps since the last
logged point; validation metrics are logged after each validation.
"""

import csv
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pocketlm.checkpoint.runs import Run
from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.hardware.measure import memory_in_use
from pocketlm.training.module import StepCallback, TrainingProgress
from pocketlm.training.tensorboard import TensorBoard

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
    """Writes scalars to TensorBoard and metrics.csv, and the progress of the run to stderr."""

    def __init__(
        self,
        run: Run,
        config: Config,
        bytes_per_token: float,
        first_step: int,
        progress: TrainingProgress,
        tensorboard: TensorBoard,
    ):
        self.run, self.config, self.training = run, config, config.training
        self.bytes_per_token, self.first_step = bytes_per_token, first_step
        self.progress, self.tensorboard = progress, tensorboard
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.paused = 0.0  # seconds since the last logged point that were not training
        self.validation_start: float | None = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            self.console.quiet = True
        elif self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(16),
                TextColumn("{task.fields[text]}"),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(
                "", total=self.training.steps, completed=self.first_step, text=""
            )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if trainer.is_global_zero:
            # not earlier: until here a resume may be refused, and then no point may be lost
            drop_rows_after(self.run.metrics_file, self.first_step)
            self.tensorboard.open(self.config)
        self.start = self.last = time.perf_counter()
        self.start_step = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.validation_start is not None:  # validation has ended: time training again
            self.paused += time.perf_counter() - self.validation_start
            self.validation_start = None

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step % self.training.log_every_steps and step not in (1, self.training.steps):
            return
        loss_sum, targets = self.progress.take_interval()  # waits for the device
        now = time.perf_counter()
        loss = loss_sum / targets
        if not math.isfinite(loss):
            raise UserError(non_finite("the training loss", step))
        speed = (targets - self.progress.resumed_targets) / (now - self.last - self.paused)
        metrics = {
            "train/loss": loss,
            "train/bpb": loss / math.log(2) / self.bytes_per_token,
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/grad_norm": float(self.progress.grad_norm),
            "perf/tokens_per_second": speed,
            "perf/memory_mb": memory_in_use(module.device.type),
        }
        self.write(trainer, step, self.progress.tokens_seen, metrics)
        text = f"loss {loss:.3f}  {speed:,.0f} tokens/s"
        if step > self.start_step + 1:  # the first step includes the warm-up of the device
            done = (step - self.start_step) / (self.training.steps - self.start_step)
            text += f"  {as_clock((now - self.start) * (1 - done) / done)} left"
        self.print_status(step, text)
        self.last, self.progress.resumed_targets, self.paused = now, 0, 0.0

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step, values = trainer.global_step, self.progress.validation
        metrics = {f"val/{name}": value for name, value in values.items()}
        self.write(trainer, step, self.progress.tokens_so_far(), metrics)
        self.print_status(
            step,
            f"validation loss {values['loss']:.4f}  bits per byte {values['bpb']:.4f}  "
            f"perplexity {values['perplexity']:.1f}",
            permanent=True,
        )

    def write(self, trainer: L.Trainer, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Write a row of metrics.csv and the same points to TensorBoard."""
        if not trainer.is_global_zero:
            return
        self.tensorboard.add_columns(metrics, step)
        row = {"step": step, "tokens": tokens}
        append_row(
            self.run.metrics_file, row | {name: f"{value:.6g}" for name, value in metrics.items()}
        )

    def print_status(self, step: int, text: str, permanent: bool = False) -> None:
        """Update the progress bar on a terminal, else print a line; permanent text always."""
        if self.bar is None:
            self.console.print(f"step {step}/{self.training.steps}  {text}", soft_wrap=True)
        elif permanent:
            self.bar.console.print(f"step {step}  {text}", soft_wrap=True)
        else:
            self.bar.update(self.task, completed=step, text=text)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.tensorboard.close()
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def append_row(path: Path, row: Mapping[str, int | str]) -> None:
    """Append a row to metrics.csv, below a header if the file is new."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def drop_rows_after(path: Path, step: int) -> None:
    """Drop the rows of metrics.csv after `step`: a resumed run takes those steps again."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


def non_finite(what: str, step: int) -> str:
    """Return the message for a value that is not finite."""
    return (
        f"{what} is not finite at step {step}; training has stopped and the checkpoints on disk "
        "are from before. Lower training.lr or raise training.warmup_steps, and begin with "
        "--fresh or another run.name"
    )


def as_clock(seconds: float) -> str:
    """Format a duration.

    >>> as_clock(75), as_clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
