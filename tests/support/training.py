"""Tiny runs of train.py's `main`, and what tests compare of them."""

import csv
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.config.sections import Config
from pocketlm.hardware.devices import Hardware
from pocketlm.training import loop
from pocketlm.training.module import StepCallback

TINY = [
    "model.n_layers=2",
    "model.d_model=16",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.dropout=0.1",
    "training.seq_len=16",
    "training.micro_batch_size=4",
    "training.grad_accum_steps=2",
    "training.max_steps=12",
    "training.warmup_steps=2",
    "training.val_every_steps=5",
    "training.save_every_steps=3",
    "training.log_every_steps=2",
    "data.path=text.txt",
    "data.tokenizer=byte",
    "training.lr=4e-3",
    "training.precision=32-true",
    "hardware.accelerator=cpu",
]
LINES = ["data.separator=line", "data.val_share=0.2"]  # 42 training documents: 52 rows
STREAM = [*LINES, "data.streaming=true", "data.shuffle_buffer=5"]


def write_text_and_config(folder: Path) -> None:
    """Write a text of which an epoch is 7 steps of TINY, and a config."""
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(50)))
    (folder / "config.yaml").write_text("model: {}\n")


def run(*overrides: str, flags: tuple[str, ...] = ()) -> None:
    """Train a tiny model in the working directory."""
    assert train.main(["--config", "config.yaml", *flags, *TINY, *overrides]) == 0


# ---- interruptions ----


class SignalAfter(StepCallback):
    """Sends a signal to the process of `rank` (None: every process) when `step` has been taken."""

    def __init__(self, step: int, number: int, rank: int | None):
        self.step, self.number, self.rank = step, number, rank

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.number)


@contextmanager
def signal_after(step: int, number: int = signal.SIGTERM, rank: int | None = 0) -> Iterator[None]:
    """Send a signal during the runs of this context: after the step is logged, before it is saved.

    The callback goes behind the first two, the random state and the metrics.
    """
    original = loop.make_trainer

    def make_trainer(config: Config, hardware: Hardware, callbacks: list[L.Callback]) -> L.Trainer:
        signaller = SignalAfter(step, number, rank)
        return original(config, hardware, [*callbacks[:2], signaller, *callbacks[2:]])

    with patch.object(loop, "make_trainer", make_trainer):
        yield


def run_stopped_after(step: int, *overrides: str) -> None:
    """Begin a run that a SIGTERM stops."""
    with signal_after(step), pytest.raises(SystemExit) as stop:
        run(*overrides)
    assert stop.value.code == 128 + signal.SIGTERM


# ---- comparisons ----


def weights_and_optimizer(path: str | Path) -> list[torch.Tensor]:
    """Return the parameters of a checkpoint and the optimizer's state of each."""
    state = read_checkpoint(path)
    moments = [
        value
        for parameter_state in state["optimizer_states"][0]["state"].values()
        for value in parameter_state.values()
    ]
    return [*state["state_dict"].values(), *moments]


def are_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def end_equal(*folders: str | Path) -> bool:
    """Return whether two runs ended with the same parameters and optimizer state, bit by bit."""
    a, b = (weights_and_optimizer(Path(folder) / "final.ckpt") for folder in folders)
    return are_equal(a, b)


def checkpoint_bytes(folder: str = "checkpoints") -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).glob("*.ckpt")}


def read_rows(path: str | Path = "logs/metrics.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def rows_without_timing(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without speed and memory, which differ between equal runs."""
    return [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in read_rows(path)
    ]


def read_events(folder: str | Path) -> EventAccumulator:
    """Read the event files of a folder as TensorBoard does."""
    return EventAccumulator(str(folder)).Reload()
