"""Choice of the checkpoint at which a run resumes: the newest whole one, by its content.

A save gives one checkpoint up to four names, one after the other, and a kill between two of them
leaves some as they were. So neither names nor times of files decide: the step and the validation
loss inside do, and the names are put right at the start.
"""

import math
import os
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pocketlm.checkpoint.changes import (
    CHANGEABLE,
    Previous,
    changed_keys,
    name_rounding_differences,
)
from pocketlm.checkpoint.format import DamagedCheckpoint, read_checkpoint
from pocketlm.checkpoint.runs import Run
from pocketlm.checkpoint.sharded import SHARDS, changed_shard
from pocketlm.checkpoint.validation import non_finite_problem, training_problem
from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.hardware.processes import is_first_process, print_note

FIXED_NAMES = ("last.ckpt", "final.ckpt", "best.ckpt")
REMEDY = "--fresh moves the old outputs aside and starts again; run.name=NAME keeps both"


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a run, by its metadata."""

    path: Path
    metadata: dict[str, Any]
    step: int
    length: int  # steps of the run when it was saved
    val_loss: float | None  # of this very step; None if it was not validated
    waited: int = 0  # validations in a row without a new lowest loss
    ended: bool = False  # whether it is the run's last one

    @classmethod
    def read(cls, path: Path) -> "Saved":
        """Read the metadata only. Raises UserError, and DamagedCheckpoint."""
        state = read_checkpoint(path, metadata_only=True)
        metadata, step = state["kit"], state["global_step"]
        try:
            training = Previous.from_metadata(metadata, str(path)).config.training
        except UserError as error:
            raise DamagedCheckpoint(str(error)) from None
        length = training.max_steps if isinstance(training.max_steps, int) else 0
        waited = metadata.get("waited", 0)
        ended = bool(length) and training.has_ended(step, waited)
        loss = metadata["val_loss"] if length and training.validates(step) else None
        return cls(path, metadata, step, length, loss, waited, ended)


@dataclass(frozen=True)
class Examination:
    """The problems of a whole checkpoint: clauses, or None where nothing is wrong."""

    damage: str | None = None
    resume_problem: str | None = None

    @classmethod
    def of(cls, path: Path) -> "Examination":
        try:
            state = read_checkpoint(path, whole=False)  # of a model too large for one machine
        except DamagedCheckpoint as error:
            return cls(damage=str(error))
        if SHARDS in state and (problem := changed_shard(state, path)):
            return cls(damage=f"the checkpoint {path} is damaged: {problem}")
        if problem := non_finite_problem(state):
            return cls(damage=f"the checkpoint {path} is of no use: {problem}")
        problem = training_problem(state)
        return cls(resume_problem=problem and f"no run can resume from {path}: {problem}")


class SavedRun:
    """The checkpoints of a run. No file is changed until `repair`."""

    def __init__(self, run: Run):
        self.run = run
        self.damaged: dict[Path, str] = {}  # what is wrong with each damaged file
        self.saved: list[Saved] = []
        self._examined: dict[tuple[int, int], Examination] = {}  # by device and inode
        for path in [*(run.checkpoints / name for name in FIXED_NAMES), *run.numbered()]:
            if path.exists():
                try:
                    self.saved.append(Saved.read(path))
                except DamagedCheckpoint as error:
                    self.damaged[path] = str(error)
        self.saved.sort(key=lambda saved: -saved.step)  # the first of equals stays the first

    def examine(self, saved: Saved) -> Examination:
        """Read a whole file, which is read once even if it has several names."""
        status = saved.path.stat()
        key = (status.st_dev, status.st_ino)
        if key not in self._examined:
            self._examined[key] = Examination.of(saved.path)
        if damage := self._examined[key].damage:
            self.damaged[saved.path] = damage
        return self._examined[key]

    @cached_property
    def newest(self) -> Saved | None:
        """The newest checkpoint that a run can resume from; None if the run has no checkpoint.

        Those passed over are named. Raises UserError if none is left.
        """
        passed_over = []
        for saved in self.saved:
            examination = self.examine(saved)
            if examination.resume_problem:
                passed_over.append(examination.resume_problem)
            elif not examination.damage:
                for message in [*self.damaged.values(), *passed_over]:
                    print_note(f"{message}: going back to {saved.path}")
                return saved
        if problems := [*self.damaged.values(), *passed_over]:
            raise UserError(
                f"{'; '.join(problems)}; no checkpoint of this run is left to resume from: use "
                "--fresh to start again"
            )
        return None

    @cached_property
    def best(self) -> Saved | None:
        """The undamaged checkpoint with the lowest validation loss; best.ckpt of equals."""
        validated = [(saved.val_loss, saved) for saved in self.saved if saved.val_loss is not None]
        finite = [(loss, saved) for loss, saved in validated if math.isfinite(loss)]
        finite.sort(key=lambda pair: (pair[0], pair[1].path.name != "best.ckpt"))
        return next((saved for _, saved in finite if not self.examine(saved).damage), None)

    def repair(self, keep: int) -> bool:
        """Give the newest, the best and the final checkpoint their names, where a kill did not.

        Damaged files are renamed to NAME.damaged, and old numbered ones deleted, as after a save.
        keep: `training.keep_checkpoints`. Return whether the final checkpoint had no name.
        """
        newest, best = self.newest, self.best
        assert newest is not None
        names = {"last.ckpt": newest}
        if newest.ended:
            names["final.ckpt"] = newest
        if best:
            names["best.ckpt"] = best
        wrong = {name: saved for name, saved in names.items() if not self._has_name(name, saved)}
        if is_first_process():
            for path in self.damaged:
                os.replace(path, unused_name(path))
            for name, saved in wrong.items():
                self.run.give_name(saved.path, name, only=keep == 1)
                print_note(f"{self.run.checkpoints / name} is {saved.path.name} again")
            self.run.prune(keep)
        return "final.ckpt" in wrong

    def _has_name(self, name: str, saved: Saved) -> bool:
        """Return whether the undamaged file of this name is as good."""
        for other in self.saved:
            if other.path.name == name and other.path not in self.damaged:
                if name == "best.ckpt":
                    return other.val_loss == saved.val_loss
                return other.step == saved.step
        return False


def unused_name(path: Path) -> Path:
    """Return NAME.damaged, with a number if there is one already."""
    candidates = [path.with_name(f"{path.name}.damaged")]
    while candidates[-1].exists():
        candidates.append(path.with_name(f"{path.name}.damaged-{len(candidates) + 1}"))
    return candidates[-1]


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint from which a run resumes."""

    path: Path
    step: int
    max_steps: int  # length of the run when the checkpoint was saved
    best: float | None = None  # validation loss of best.ckpt
    history: tuple[dict[str, Any], ...] = ()  # with the changes that this command makes
    verdict_only: bool = False  # the run has ended, and was killed before its verdict
    waited: int = 0  # validations in a row without a new lowest loss


def read_previous(run: Run) -> Previous | None:
    """Return what the newest checkpoint says of the run; None if there is none that can be read.

    It is read before the run is locked, only to choose the hardware: `find_resume_point` decides.
    """
    if (run.checkpoints / run.MOVING).exists():
        return None
    saved = SavedRun(run).saved
    return Previous.from_metadata(saved[0].metadata, str(saved[0].path)) if saved else None


def find_resume_point(
    run: Run,
    config: Config,
    data_sha256: str,
    hardware: dict[str, Any],
    changes: Set[str] = frozenset(),
) -> ResumePoint | None:
    """Return the checkpoint that `config` resumes, or None to start from step 0.

    hardware: from `describe_hardware`. changes: the keys named with `--change`. Raises UserError if
    the run is finished, or has another config or other data.
    """
    run.finish_moving()
    saved_run = SavedRun(run)
    newest = saved_run.newest
    if newest is None:
        return None
    step, steps = newest.step, config.training.steps
    previous = Previous.from_metadata(newest.metadata, str(newest.path))
    changed = dict(changed_keys(previous, config, hardware, data_sha256))
    refuse_changes(run, {key: change for key, change in changed.items() if key not in changes})
    final_was_missing = saved_run.repair(config.training.keep_checkpoints)
    has_ended = config.training.has_ended(step, newest.waited)
    same_end = newest.ended and newest.length == steps
    verdict_only = has_ended and same_end and (final_was_missing or run.is_marked())
    if has_ended and not verdict_only:
        early, key = "", "max_steps"
        if step < steps:
            early, key = f" and {newest.waited} validations without a lower loss", "patience"
        raise UserError(
            f"the run in {run.checkpoints} is finished: {step} of {steps} steps{early}; "
            f"raise training.{key} to continue it; {REMEDY}"
        )
    name_rounding_differences(previous, hardware)
    entries = [f"{key}: {change}" for key, change in changed.items()]
    if newest.length != steps:
        entries.append(f"training.max_steps: {newest.length} -> {steps}")
    new = ({"step": step, "changes": entries},) if entries else ()
    best = saved_run.best
    return ResumePoint(
        newest.path,
        step,
        newest.length,
        best.val_loss if best else None,
        (*previous.history, *new),
        verdict_only,
        newest.waited,
    )


def refuse_changes(run: Run, changed: dict[str, str]) -> None:
    """Raise UserError if something of the run has changed on which its weights depend."""
    if not changed:
        return
    listed = ", ".join(f"{key}: {change}" if change else key for key, change in changed.items())
    hint = ""
    if changed.keys() <= CHANGEABLE:
        hint = f"; to go on with it from here: --change {next(iter(changed))}=VALUE"
    raise UserError(f"{run.checkpoints} holds a run with another config ({listed}); {REMEDY}{hint}")
