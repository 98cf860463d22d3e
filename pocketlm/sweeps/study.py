"""The record of a sweep on the disk: what it is, and how each of its runs ended.

    sweeps/NAME/study.journal   an optuna study (journal storage): a trial for each run that ended
    sweeps/NAME/logs/RUN.txt    what train.py printed
    checkpoints/RUN, logs/RUN   the run itself, as train.py writes it

A run in progress has no trial: its checkpoint says where it is. So a kill at any time leaves no
half-recorded run, and the same command goes on.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from pocketlm.checkpoint.runs import Run
from pocketlm.config.loading import load_config
from pocketlm.config.sections import Config
from pocketlm.errors import UserError
from pocketlm.hardware.disk import require_writable
from pocketlm.sweeps.runs import NON_FINITE, Ending, Losses
from pocketlm.sweeps.space import Axis, Configuration, number, require_few

FOLDER = Path("sweeps")
UNFINISHED = "unfinished"  # attribute of the study: seconds of the run that has no trial yet

Key = tuple[int, int]  # number of a configuration, from 1, and seed


@dataclass(frozen=True)
class Record:
    """A run that has ended: finished, stopped at a rung, or failed."""

    number: int  # of its configuration, from 1
    seed: int
    seconds: float
    losses: Losses | None
    problem: str = ""
    finished: bool = False

    @property
    def final(self) -> bool:
        """Return whether the same command would end in the same way."""
        return not self.problem or NON_FINITE in self.problem


class Study:
    """A sweep: its configurations, and the records of their runs."""

    def __init__(self, name: str, configurations: Sequence[Configuration], axes: Sequence[Axis]):
        self.name, self.configurations, self.axes = name, list(configurations), list(axes)
        self.folder = FOLDER / name
        self.records: dict[Key, Record] = {}

    @contextmanager
    def open(self, identity: dict[str, Any]) -> Iterator[None]:
        """Lock the folder and read its records.

        identity: what must not change while the sweep goes on, by name. Raises UserError if the
        folder is of another sweep, or in use.
        """
        require_writable(self.folder, "sweeps")
        try:
            with FileLock(self.folder / ".lock").acquire(timeout=0):
                self._read()
                self._check_identity(identity)
                yield
        except Timeout:
            raise UserError(
                f"another process works on {self.folder}; wait until it ends, or name this sweep: "
                "run.name=NAME"
            ) from None

    def _read(self) -> None:
        """Read the storage, which begins here if there is none. Raises UserError."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal = mended_journal(self.folder)
        try:
            storage = JournalStorage(JournalFileBackend(str(journal)))
            self.study = optuna.create_study(
                storage=storage, study_name=self.name, load_if_exists=True
            )
            for record in map(read_record, self.study.trials):
                self.records[record.number, record.seed] = record
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(
                f"{journal} is damaged ({error}); remove it, and the same command records the runs "
                "that are finished again, without training them"
            ) from None

    def check_runs(self, seeds: Sequence[int]) -> None:
        """Raise UserError for a name of a run, or a seed, that train.py would refuse."""
        require_few(len(seeds) * len(self.configurations), "runs")
        for last in (1, len(self.configurations)):
            configuration = self.configuration(last)
            run = self.run((last, seeds[-1]))
            own = [f"run.name={run.name}", f"training.seed={seeds[-1]}"]
            load_config(configuration.path, [*configuration.overrides, *own])

    def _check_identity(self, identity: dict[str, Any]) -> None:
        identity = json.loads(json.dumps(identity))  # as the storage returns it
        before = self.study.user_attrs.get("identity")
        if before is None:
            self.study.set_user_attr("identity", identity)
            return
        if changed := changes(before, identity):
            raise UserError(
                f"{self.folder} holds a sweep with other settings ({', '.join(changed)}); "
                "run.name=NAME keeps both"
            )

    def configuration(self, number: int) -> Configuration:
        return self.configurations[number - 1]

    def run(self, key: Key) -> Run:
        """Return the run of a configuration and a seed."""
        number, seed = key
        return Run(f"{self.name}-{number:03d}-s{seed}")

    def log(self, key: Key) -> Path:
        return self.folder / "logs" / f"{self.run(key).name}.txt"

    def steps(self, key: Key) -> int:
        """Return the steps of a whole run; the config has been resolved."""
        return self.configuration(key[0]).config.training.steps

    # ---- time ----

    @property
    def seconds(self) -> float:
        """The time that all runs have taken, in this process and those before."""
        ended = sum(record.seconds for record in self.records.values())
        return ended + sum(self._unfinished().values())

    def _unfinished(self) -> dict[str, float]:
        return dict(self.study.user_attrs.get(UNFINISHED, {}))

    def seconds_before(self, key: Key) -> float:
        """Return the time that a run has taken without an end, before it was stopped."""
        return self._unfinished().get(self.run(key).name, 0.0)

    def keep_seconds(self, key: Key, seconds: float) -> None:
        """Record the time of a run in progress, which a kill must not lose."""
        times = self._unfinished() | {self.run(key).name: round(seconds, 1)}
        self.study.set_user_attr(UNFINISHED, times)

    # ---- records ----

    def add(self, key: Key, ending: Ending, seconds: float) -> Record:
        """Record how a run ended; seconds: of all processes that trained it."""
        losses = ending.losses
        finished = not ending.problem and not ending.stopped
        record = Record(*key, round(seconds, 1), losses, ending.problem, finished)
        self.study.add_trial(self._trial(record))
        self.records[key] = record
        times = self._unfinished()
        if times.pop(self.run(key).name, None) is not None:
            self.study.set_user_attr(UNFINISHED, times)
        return record

    def _trial(self, record: Record) -> FrozenTrial:
        distributions: dict[str, BaseDistribution] = {a.key: a.distribution for a in self.axes}
        settings = self.configuration(record.number).settings
        params = {
            axis.key: settings[axis.key] if axis.low is None else number(settings[axis.key])
            for axis in self.axes
        }
        state = TrialState.COMPLETE if record.finished else TrialState.PRUNED
        losses = record.losses
        value = losses.best_loss if losses else None
        return create_trial(
            state=TrialState.FAIL if record.problem else state,
            value=None if record.problem else value,
            params=params,
            distributions=distributions,
            user_attrs=asdict(record),
            intermediate_values={losses.step: losses.final_loss} if losses else {},
        )


def read_record(trial: FrozenTrial) -> Record:
    """Return the record that a trial was made of."""
    attributes = dict(trial.user_attrs)
    losses = attributes.pop("losses")
    return Record(**attributes, losses=Losses(**losses) if losses else None)


def mended_journal(folder: Path) -> Path:
    """Return the journal, without what a killed process left of a line or a lock.

    The caller has the folder's lock, so that nobody else is writing.
    """
    journal = folder / "study.journal"
    (folder / "study.journal.lock").unlink(missing_ok=True)
    if journal.exists():
        content = journal.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(journal, whole)
    return journal


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a text for each name whose value differs.

    >>> changes({"training.lr": "1e-3", "model.norm": "rms"}, {"training.lr": "2e-3"})
    ['training.lr: 1e-3 -> 2e-3', 'model.norm: rms -> none']
    """
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name}: {before.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in names
        if before.get(name, "none") != now.get(name, "none")
    ]


def identity(config: Config, axes: Sequence[Axis]) -> dict[str, Any]:
    """Return what makes two sweeps the same: their keys with the values, and all other keys.

    The name, the seed and what a run adapts to its machine are left out.
    """
    keys = {axis.key: axis.text for axis in axes}
    rest = {
        f"{section}.{name}": value
        for section, values in config.to_dict().items()
        for name, value in values.items()
    }
    for name in ("run.name", "training.seed"):
        rest.pop(name, None)
    return rest | keys
