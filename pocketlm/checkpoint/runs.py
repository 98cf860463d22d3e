"""The folders of a run and what is in them already: continue it, refuse, or move it aside. Nothing is overwritten."""

import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import Config
from pocketlm.errors import UserError

# keys that may change between a run and its continuation, since no weight depends on them
FREE_KEYS = {
    "run.name",
    "data.cache_dir",
    "training.max_steps",
    "training.max_epochs",
    "training.log_every_steps",
    "training.val_every_steps",
    "training.probe_cases",
    "training.save_every_steps",
    "training.keep_checkpoints",
}


@dataclass(frozen=True)
class Run:
    """Where a run keeps its outputs: with a name in folders of its own, else the files directly in the two top ones."""

    name: str

    @property
    def checkpoints(self) -> Path:
        return Path("checkpoints") / self.name

    @property
    def logs(self) -> Path:
        return Path("logs") / self.name

    @property
    def metrics_file(self) -> Path:
        return self.logs / "metrics.csv"

    def numbered(self) -> list[Path]:
        """The checkpoints with a step in their name, newest first."""
        return sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)

    def lock(self) -> AbstractContextManager:
        """Make the folders and keep other runs out until this one ends. Raises UserError where one is in already.

        Of the processes of one run, which share the folders, the first locks for all.
        """
        if not is_first_process():
            return nullcontext()
        for folder in (self.checkpoints, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.checkpoints / ".lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process is training in {self.checkpoints}; wait for it, or give this run a name: run.name=NAME"
            ) from None
        for leftover in self.checkpoints.glob(".*.unfinished"):
            leftover.unlink()
        return held

    def move_aside(self) -> list[Path]:
        """Move this run's files into old-<time>/ beside them; return where to."""
        stamp = time.strftime("old-%Y%m%d-%H%M%S")
        moved = []
        for folder in (self.checkpoints, self.logs):
            files = [p for p in folder.glob("*") if p.is_file() and p.name != ".lock"]
            if files:
                target = folder / stamp
                target.mkdir(parents=True)
                for file in files:
                    file.rename(target / file.name)
                moved.append(target)
        return moved

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """last.ckpt and its content, or else the newest readable checkpoint; damaged ones are passed over, and named."""
        damaged: list[str] = []
        for path in [
            self.checkpoints / "last.ckpt",
            *self.numbered(),
            self.checkpoints / "final.ckpt",
            self.checkpoints / "best.ckpt",
        ]:
            if not path.exists():
                continue
            try:
                state = read_checkpoint(path)
            except UserError as error:
                damaged.append(str(error))
                continue
            for message in damaged:
                print_note(f"{message}: going back to {path}")
            return path, state
        if damaged:
            raise UserError(
                f"{'; '.join(damaged)}; no checkpoint of this run is left to continue from: --fresh begins anew"
            )
        return None


def print_note(text: str) -> None:
    """A line on stderr, once a run."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this is the first of the processes of a run on several devices or machines, or the only one."""
    return all(
        os.environ.get(name, "0") == "0"
        for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    )


@dataclass(frozen=True)
class Start:
    """The checkpoint a run goes on from, its step, and the length the run had."""

    path: Path
    step: int
    max_steps: int


def find_start(run: Run, config: Config, data_sha256: str) -> Start | None:
    """The checkpoint that `config` continues, or None to begin. Raises UserError for a finished or a different run."""
    found = run.newest()
    if found is None:
        return None
    path, state = found
    step = state["global_step"]
    ways_out = "--fresh moves the old outputs aside and begins anew; run.name=NAME keeps both"
    before = config_from_dict(state["kit"]["config"], origin=str(path))
    changed = differences(before, config)
    if state["kit"].get("data_sha256") != data_sha256:
        changed.append("the tokens to train on")
    if changed:
        raise UserError(
            f"{run.checkpoints} holds a run with another config ({', '.join(changed)}); {ways_out}"
        )
    if step >= config.training.max_steps:
        raise UserError(
            f"the run in {run.checkpoints} is finished: {step} of {config.training.max_steps} steps; "
            f"raise training.max_steps to go on; {ways_out}"
        )
    return Start(path, step, before.training.max_steps)


def differences(before: Config, now: Config) -> list[str]:
    """`key: before -> now` for each key that decides the weights and differs."""
    old, new = before.to_dict(), now.to_dict()
    return [
        f"{section}.{key}: {value!r} -> {new[section][key]!r}"
        for section, values in old.items()
        if section not in ("hardware", "sampling")
        for key, value in values.items()
        if f"{section}.{key}" not in FREE_KEYS and value != new[section][key]
    ]
