"""The folders of a run and the outputs in them, which can be moved aside as one.

Nothing is overwritten.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.lock import run_lock
from pocketlm.checkpoint.sharded import SHARDS
from pocketlm.config.sections import TENSORBOARD_RUNS
from pocketlm.files import atomic_write, link_or_copy, remove
from pocketlm.hardware.disk import require_writable
from pocketlm.hardware.processes import is_first_process


@dataclass(frozen=True)
class Run:
    """The location of a run's outputs.

    A named run has folders of its own in checkpoints/ and logs/; an unnamed one writes directly
    into these two.
    """

    MOVING: ClassVar = ".moving"  # names of files in the checkpoint folder
    RUNNING: ClassVar = ".running"

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

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folders and keep other runs out of them until the context ends.

        The first process of a run locks for all of them. Raises UserError if a folder cannot be
        written to, or if another run has the lock.
        """
        if not is_first_process():
            yield
            return
        require_writable(self.checkpoints, "checkpoints")
        require_writable(self.logs, "logs")
        with run_lock(self.checkpoints):
            for leftover in self.checkpoints.glob(".*.unfinished"):
                remove(leftover)
            yield

    # ---- one move of many files ----

    def move_aside(self) -> list[Path]:
        """Move this run's outputs into subfolders old-<time>/; return these folders.

        A file with the name of the subfolders stands in the checkpoint folder meanwhile, so that
        the next start finishes what a kill interrupts.
        """
        journal = self.checkpoints / self.MOVING
        if not journal.exists():
            if not any(self._outputs(folder) for folder in (self.checkpoints, self.logs)):
                return []
            with atomic_write(journal) as unfinished:
                unfinished.write_text(self._unused_folder())
        moved = []
        for folder in (self.checkpoints, self.logs):
            target = folder / journal.read_text()
            for output in self._outputs(folder):
                target.mkdir(exist_ok=True)
                output.rename(target / output.name)
            moved += [target] * target.exists()
        self.mark_finished()
        journal.unlink()
        return moved

    def finish_moving(self) -> None:
        """Finish a `move_aside` that a kill interrupted."""
        if is_first_process() and (self.checkpoints / self.MOVING).exists():
            self.move_aside()

    def _outputs(self, folder: Path) -> list[Path]:
        """Return this run's files, and folders of event files, in one of its folders."""
        outputs = [p for p in folder.glob("*") if p.is_file() and not p.name.startswith(".")]
        return outputs + (self.tensorboard_folders() if folder == self.logs else self._shards())

    def _unused_folder(self) -> str:
        """Return a name old-<time> that neither folder has."""
        stamp = name = time.strftime("old-%Y%m%d-%H%M%S")
        number = 1
        while (self.checkpoints / name).exists() or (self.logs / name).exists():
            number += 1
            name = f"{stamp}-{number}"
        return name

    # ---- a mark from the first step to the end of the verdict ----

    def mark_running(self) -> None:
        if is_first_process():
            (self.checkpoints / self.RUNNING).touch()

    def mark_finished(self) -> None:
        (self.checkpoints / self.RUNNING).unlink(missing_ok=True)

    def is_marked(self) -> bool:
        """Return whether the run has begun and was killed before the end of its verdict."""
        return (self.checkpoints / self.RUNNING).exists()

    # ---- names of checkpoints ----

    def give_name(self, path: Path, name: str, *, only: bool = False) -> None:
        """Give a finished checkpoint a second name, which is replaced atomically.

        `last.ckpt` is a copy if there is no other checkpoint, or `only` says that there will be
        none: a damaged sector of one file would otherwise lose everything.
        """
        alone = only or len(self.numbered()) <= 1
        link_or_copy(path, self.checkpoints / name, copy=alone and name == "last.ckpt")

    def prune(self, keep: int) -> None:
        """Delete all numbered checkpoints but the newest `keep`; 0 keeps all."""
        if keep:
            for old in self.numbered()[keep:]:
                old.unlink()
        folders = self._shards()
        if folders:
            checkpoints = [read_checkpoint(p, metadata_only=True) for p in self._checkpoint_files()]
            used = {state[SHARDS]["folder"] for state in checkpoints if SHARDS in state}
            for folder in folders:
                if folder.name not in used:
                    remove(folder)

    def _shards(self) -> list[Path]:
        """Return the folders with the tensors of sharded checkpoints."""
        return [path for path in self.checkpoints.glob("*.shards") if path.is_dir()]

    def _checkpoint_files(self) -> list[Path]:
        return [path for path in self.checkpoints.glob("*.ckpt") if path.is_file()]

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
