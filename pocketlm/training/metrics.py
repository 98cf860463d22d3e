"""Metrics of a run: one line of text, one row of metrics.csv and TensorBoard points at a time.

Training metrics are logged every `log_every_steps`, and are means over the steps since the last
logged point; validation metrics are logged after each validation.
"""

import csv
import math
import os
import re
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pocketlm.checkpoint.runs import Run
from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.files import atomic_write
from pocketlm.hardware.measure import memory_in_use
from pocketlm.hardware.processes import print_note
from pocketlm.training.module import StepCallback, TrainingProgress, non_finite
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
    """Writes scalars to TensorBoard and metrics.csv, and the progress of the run to stderr.

    A file that cannot be written is named once, and costs the run no step.
    """

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
        self.writing = False
        self.recent: deque[float] = deque(maxlen=20)  # training losses of the last logged points

    def open_logs(self) -> None:
        """Open metrics.csv and the event files, at the step from which the run goes on."""
        self.writing = True
        try:
            drop_rows_after(self.run.metrics_file, self.first_step)
        except (OSError, UserError) as error:
            self._stop_writing(error)
        self.tensorboard.open(self.config)

    def _stop_writing(self, error: Exception) -> None:
        self.writing = False
        print_note(
            f"{self.run.metrics_file} gets no more rows: {error}; training goes on without it"
        )

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the rows before a checkpoint on the disk, so that a power cut keeps them with it."""
        if self.writing and self.run.metrics_file.exists():
            try:
                sync_file(self.run.metrics_file)
            except OSError as error:
                self._stop_writing(error)

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
            self.open_logs()
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
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        if not targets:  # every step since the last logged point was left out
            self.last, self.paused = now, 0.0
            return
        loss = loss_sum / targets
        if not math.isfinite(loss):
            problem = "the training loss is not finite"
            raise UserError(non_finite(problem, step, rate, self.training.lr))
        self.report_spike(step, loss)
        speed = (targets - self.progress.resumed_targets) / (now - self.last - self.paused)
        metrics = {
            "train/loss": loss,
            "train/bpb": loss / math.log(2) / self.bytes_per_token,
            "train/lr": rate,
            "train/grad_norm": float(self.progress.grad_norm),
            "perf/tokens_per_second": speed,
            "perf/memory_mb": memory_in_use(module.device.type),
        }
        self.write(step, self.progress.tokens_seen, metrics)
        text = f"loss {loss:.3f}  {speed:,.0f} tokens/s"
        if step > self.start_step + 1:  # the first step includes the warm-up of the device
            done = (step - self.start_step) / (self.training.steps - self.start_step)
            text += f"  {as_clock((now - self.start) * (1 - done) / done)} left"
        self.print_status(step, text)
        self.last, self.progress.resumed_targets, self.paused = now, 0, 0.0

    def report_spike(self, step: int, loss: float) -> None:
        """Print a line if the training loss is far above those of the last logged points."""
        usual = loss_before_spike(self.recent, loss)
        if usual is not None:
            self.print_status(
                step,
                f"the training loss is {loss:.3f}, after {usual:.3f}; if it does not come down "
                "again, a lower training.lr or training.grad_clip may help",
                permanent=True,
            )
        self.recent.append(loss)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step, values = trainer.global_step, self.progress.validation
        metrics = {f"val/{name}": value for name, value in values.items()}
        self.progress.validated_tokens = self.progress.tokens_so_far()  # of all processes
        self.write(step, self.progress.validated_tokens, metrics)
        self.print_status(
            step,
            f"validation loss {values['loss']:.4f}  bits per byte {values['bpb']:.4f}  "
            f"perplexity {values['perplexity']:.1f}",
            permanent=True,
        )

    def write(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Write a row of metrics.csv and the same points to TensorBoard."""
        self.tensorboard.add_columns(metrics, step)
        row: dict[str, int | str] = {"step": step, "tokens": tokens}
        row |= {name: f"{value:.6g}" for name, value in metrics.items()}
        if self.writing:
            try:
                append_row(self.run.metrics_file, row)
            except OSError as error:
                self._stop_writing(error)

    def has_row(self, step: int, column: str) -> bool:
        """Return whether metrics.csv has a value of this step already, from before a resume."""
        if step != self.first_step:
            return False
        rows, _ = read_rows(self.run.metrics_file)
        return any(int(row["step"]) == step and row.get(column) for row in rows)

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


def sync_file(path: Path) -> None:
    """Put what has been written to a file on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def drop_rows_after(path: Path, step: int) -> None:
    """Drop the rows of metrics.csv after `step`: a resumed run takes those steps again.

    Lines that are damaged are left out with a note; the file as it was is then kept beside it.
    """
    if not path.exists():
        return
    rows, n_damaged = read_rows(path)
    if n_damaged:
        damaged = path.with_name(path.name + ".damaged")
        os.replace(path, damaged)
        print_note(f"{path} has {n_damaged} damaged lines, which are left out; see {damaged}")
    with atomic_write(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["step"]) <= step)


def read_rows(path: Path) -> tuple[list[dict[str, str]], int]:
    """Return the rows of metrics.csv and the number of damaged lines; none if it is no file.

    Its header may be of an earlier version, with fewer columns, or be lost.
    """
    if not path.is_file():
        return [], int(path.exists())
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "\ufffd")
    lines = text.splitlines()
    if not lines:
        return [], 0
    header = lines[0].split(",")
    has_header = header[0] == "step" and set(header) <= set(CSV_COLUMNS)
    columns = header if has_header else CSV_COLUMNS
    rows = []
    for line in lines[has_header:]:
        fields = line.split(",")  # all of them are numbers, which need no quotes
        is_step = re.fullmatch("[0-9]{1,15}", fields[0])
        if is_step and len(fields) == len(columns) and all(map(is_number_or_empty, fields)):
            rows.append(dict(zip(columns, fields, strict=True)))
    return rows, max(len(lines) - has_header - len(rows), not has_header)


def is_number_or_empty(field: str) -> bool:
    try:
        float(field or 0)
    except ValueError:
        return False
    return True


def loss_before_spike(recent: Sequence[float], loss: float) -> float | None:
    """Return the usual loss if `loss` is a spike above the recent ones; None if it is none.

    It is one if it is above their median by a fifth of it, and by eight times their median
    distance from it. Fewer than five losses are not enough to tell.

    >>> loss_before_spike([2.2, 2.0, 2.1, 1.9, 2.0], 2.3), loss_before_spike([2.0] * 5, 2.5)
    (None, 2.0)
    """
    if len(recent) < 5:
        return None
    usual = statistics.median(recent)
    spread = statistics.median(abs(value - usual) for value in recent)
    return usual if loss > usual + max(usual / 5, 8 * spread) else None


def as_clock(seconds: float) -> str:
    """Format a duration.

    >>> as_clock(75), as_clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
