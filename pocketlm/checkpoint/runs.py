"""The folders of a run and the outputs in them: resume from them, refuse, or move them aside.

Nothing is overwritten.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import TENSORBOARD_RUNS, Config
from pocketlm.errors import UserError
from pocketlm.hardware.processes import is_first_process, print_note

# Keys on which no weight depends: they may differ between a run and its continuation.
RESUMABLE_CHANGES = {
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
RESUMABLE_SECTIONS = ("hardware", "sampling")  # the same for all keys of these sections


@dataclass(frozen=True)
class Run:
    """The location of a run's outputs.

    A named run has folders of its own in checkpoints/ and logs/; an unnamed one writes directly
    into these two.
    """

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
        """Return the checkpoints with a step in their name, newest first."""
        return sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)

    def lock(self) -> AbstractContextManager[Any]:
        """Create the folders and keep other runs out of them until the context ends.

        The first process of a run locks for all of them. Raises UserError if another run has the
        lock.
        """
        if not is_first_process():
            return nullcontext()
        for folder in (self.checkpoints, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.checkpoints / ".lock")
        try:
            acquired = lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process is training in {self.checkpoints}; wait until it ends, or give "
                "this run a name: run.name=NAME"
            ) from None
        for leftover in self.checkpoints.glob(".*.unfinished"):
            leftover.unlink()
        return acquired

    def move_aside(self) -> list[Path]:
        """Move this run's outputs into subfolders old-<time>/; return these folders."""
        stamp = time.strftime("old-%Y%m%d-%H%M%S")
        moved = []
        for folder in (self.checkpoints, self.logs):
            outputs = [p for p in folder.glob("*") if p.is_file() and p.name != ".lock"]
            if folder == self.logs:
                outputs += self.tensorboard_folders()
            if outputs:
                target = folder / stamp
                target.mkdir(parents=True)
                for output in outputs:
                    output.rename(target / output.name)
                moved.append(target)
        return moved

    def tensorboard_folders(self) -> list[Path]:
        """Return the folders of this run's event files.

        A folder of such a name with a metrics.csv in it is not one of them: it is the log folder
        of a run that earlier versions allowed to be named "train" or "validation".
        """
        folders = [self.logs / name for name in TENSORBOARD_RUNS]
        return [
            folder
            for folder in folders
            if folder.is_dir() and not (folder / "metrics.csv").exists()
        ]

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return last.ckpt, or else the newest readable checkpoint, and its content.

        Damaged checkpoints are skipped with a note that names them. None if the run has no
        checkpoint. Raises UserError if all of them are damaged.
        """
        others = [self.checkpoints / "final.ckpt", self.checkpoints / "best.ckpt"]
        damaged: list[str] = []
        for path in [self.checkpoints / "last.ckpt", *self.numbered(), *others]:
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
                f"{'; '.join(damaged)}; no checkpoint of this run is left to resume from: use "
                "--fresh to start again"
            )
        return None


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint from which a run resumes."""

    path: Path
    step: int
    max_steps: int  # length of the run when the checkpoint was saved


def find_resume_point(run: Run, config: Config, data_sha256: str) -> ResumePoint | None:
    """Return the checkpoint that `config` resumes, or None to start from step 0.

    Raises UserError if the run is finished, or has another config or other data.
    """
    newest = run.newest()
    if newest is None:
        return None
    path, state = newest
    step = state["global_step"]
    remedy = "--fresh moves the old outputs aside and starts again; run.name=NAME keeps both"
    previous = config_from_dict(state["kit"]["config"], origin=str(path))
    changes = changed_keys(previous, config)
    if state["kit"].get("data_sha256") != data_sha256:
        changes.append("the tokens to train on")
    if changes:
        raise UserError(
            f"{run.checkpoints} holds a run with another config ({', '.join(changes)}); {remedy}"
        )
    if step >= config.training.steps:
        raise UserError(
            f"the run in {run.checkpoints} is finished: {step} of {config.training.steps} "
            f"steps; raise training.max_steps to continue it; {remedy}"
        )
    return ResumePoint(path, step, previous.training.steps)


def changed_keys(previous: Config, current: Config) -> list[str]:
    """Return `key: previous -> current` of each changed key on which the weights depend."""
    old, new = previous.to_dict(), current.to_dict()
    changes = []
    for section, values in old.items():
        if section in RESUMABLE_SECTIONS:
            continue
        for key, value in values.items():
            name = f"{section}.{key}"
            if name not in RESUMABLE_CHANGES and value != new[section][key]:
                changes.append(f"{name}: {value!r} -> {new[section][key]!r}")
    return changes
