"""What happens around a training step: metrics, checkpoints, samples, stopping cleanly, refusing NaN.

Every interval is in optimizer steps. Nothing here waits for the device except where something is logged or saved.
"""

import csv
import math
import os
import random
import signal
import time
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from cases import joined, load_suite
from checkpoint import link_or_copy
from config import Config, TrainingConfig
from config_file import to_yaml
from engine import Request, check
from errors import UserError
from hardware import memory_in_use
from infer import whole_texts
from prepare import PreparedData
from probe_report import scalars
from results import Result
from runs import Run, print_note
from scoring import encode_case, score_cases

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

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")  # Lightning calls it only where all went well


class Metrics(StepCallback):
    """Scalars to TensorBoard and to metrics.csv, and the progress of the run to stderr."""

    def __init__(self, run: Run, training: TrainingConfig, bytes_per_token: float, first_step: int):
        self.run, self.training, self.bytes_per_token, self.first_step = run, training, bytes_per_token, first_step
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.paused = 0.0  # seconds since the last log that were not training
        self.validation_start: float | None = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            self.console.quiet = True
            return
        trainer.logger.experiment.add_text("config", "```yaml\n" + to_yaml(module.config) + "```", self.first_step)
        if self.console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(16), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.training.max_steps, completed=self.first_step, text="")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if trainer.is_global_zero:
            self._cut_csv(self.first_step)  # not before: until here a resume may be refused, and nothing is to be lost
        self.start = self.last = time.perf_counter()
        self.start_step = trainer.global_step
        self.carried = module.resumed.get("targets", 0)  # of the interval in hand, by the process before this one

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.validation_start is not None:  # all that surrounds a validation is over: the clock of training goes on
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
        self.write(trainer, trainer.global_step, module.tokens_so_far(), {f"val/{name}": value for name, value in values.items()})
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
            writer.writerow({"step": step, "tokens": tokens} | {name: f"{value:.6g}" for name, value in scalars.items()})

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


class Checkpoints(StepCallback):
    """step-N.ckpt every `save_every_steps`, the newest few kept; last.ckpt the newest, best.ckpt that of the lowest
    validation loss, final.ckpt the one at max_steps. A step that is also validated is saved after its validation."""

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


class Samples(L.Callback):
    """At every validation, how `sampling.prompts` go on, or else the openings of a few validation documents; to TensorBoard."""

    def __init__(self, config: Config, data: PreparedData):
        self.tokenizer, self.params = data.tokenizer, replace(config.sampling, seed=config.sampling.seed or 0)
        if config.sampling.prompts:
            self.prompts = [self.ids(prompt) for prompt in config.sampling.prompts]
        else:
            self.prompts = [ids.tolist() for ids in openings(data, config.model.max_seq_len)]
        self.latest: list[tuple[str, str]] = []
        try:
            check(Request(self.prompts[0], self.params), config.model.vocab_size)
        except ValueError as error:
            raise UserError(f"sampling.{error}") from None

    def ids(self, prompt: str) -> list[int]:
        ids = self.tokenizer.prefix + self.tokenizer.encode(prompt)
        if not ids:
            raise UserError(f"sampling.prompts holds {prompt!r}, and in {self.tokenizer.name!r} no token begins a document; write a text")
        return ids

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        module.model.eval()
        texts = whole_texts(module.model, self.tokenizer, self.prompts, self.params)
        self.latest = [(self.tokenizer.decode(self.prompts[n % len(self.prompts)]), text) for n, text in enumerate(texts)]
        module.model.train()
        text = "\n\n".join(f"**{prompt}**{continuation}" for prompt, continuation in self.latest)
        trainer.logger.experiment.add_text("samples", text, trainer.global_step)


def openings(data: PreparedData, context: int, count: int = 3) -> list[np.ndarray]:
    """The first ids of some validation documents: the token before the text, and eight of it."""
    shard = data.val.shards[0]
    length = max(1, min(9, context // 2, shard.header.tokens))
    last = shard.header.tokens - length
    begins = shard.offsets[: np.searchsorted(shard.offsets, last, side="right")]
    if len(begins) < count:  # few documents: anywhere in them
        begins = np.arange(0, max(1, last), max(1, last // count))
    return [shard.tokens[b : b + length].astype(np.int64) for b in begins[:: len(begins) // count or 1][:count]]


class Probes(L.Callback):
    """At every validation, the scores of `training.probe_cases`: to TensorBoard by category, their mean to metrics.csv too."""

    def __init__(self, config: Config, data: PreparedData, metrics: Metrics):
        self.metrics, self.tokenizer = metrics, data.tokenizer
        suite = joined(load_suite(path) for path in config.training.probe_cases)
        self.encoded = [encode_case(data.tokenizer, case, config.model.max_seq_len) for case in suite.cases]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        module.model.eval()
        scores = score_cases(module.model, self.tokenizer, self.encoded, top_k=1)
        module.model.train()
        step, tokens = trainer.global_step, module.tokens_so_far()
        result = Result([], step, tokens, module.validation["loss"], "", self.tokenizer.fingerprint, scores)
        found = scalars(result)
        trainer.logger.log_metrics({name: value for name, value in found.items() if name != "probe/macro"}, step)
        if result.graded:
            self.metrics.write(trainer, step, tokens, {"probe/macro": result.macro})
            low, high = result.macro_interval
            self.metrics.say(step, f"probes {result.macro:.1%} [{low:.1%}, {high:.1%}] of {len(result.graded)} cases", always=True)


class StopCleanly(StepCallback):
    """On SIGINT or SIGTERM finish the step, save it as last.ckpt and end with status 128 + signal; a second one ends at once."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints, self.signal = checkpoints, 0
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, _: Any) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.checkpoints.training.validates(trainer.global_step):  # else once the validation is in the books
            self.stop_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.stop_if_asked(trainer)

    def stop_if_asked(self, trainer: L.Trainer) -> None:
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False):
            self.signal = self.signal or signal.SIGTERM  # one process was asked: all stop at the same step
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
        if trainer.global_rank > 0:  # other processes drop other numbers, and after a resume new ones
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
    return TensorBoardLogger(run.logs, name="", version="", purge_step=first_step + 1 if first_step else None, default_hp_metric=False)
