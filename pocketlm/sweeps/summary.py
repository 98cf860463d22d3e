"""Results of a sweep: means and standard errors over seeds, and a winner where there is one.

A winner is named only if, for every other configuration, the paired 95 % t-interval of the
difference over the seeds that both were trained with is below zero. Runs of one seed have the same
order of data and, in models of one shape, the same initial weights, so they are compared in pairs.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.table import Table
from scipy.stats import t as student_t  # type: ignore[import-untyped]  # has no types

from pocketlm.evaluation.statistics import LEVEL, Interval
from pocketlm.evaluation.tables import format_interval, make_table
from pocketlm.files import atomic_write
from pocketlm.sweeps.space import Axis, describe, number
from pocketlm.sweeps.study import Record, Study
from pocketlm.training.metrics import as_clock

METRICS = {  # --metric: what it is, in a sentence
    "best_loss": "the lowest validation loss of a run, in nats per token",
    "final_loss": "the validation loss after the last step, in nats per token",
    "best_bpb": "the lowest validation bits per byte of a run",
    "final_bpb": "the validation bits per byte after the last step",
}
MAX_REASON = 60  # characters of a failure in the table


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, which a single value does not have.

    >>> mean_and_error([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896258)
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values)))


def paired_interval(differences: Sequence[float]) -> Interval:
    """Return the t-interval of a mean difference (Student 1908), of two or more pairs.

    >>> tuple(round(x, 3) for x in paired_interval([-0.2, -0.1, -0.3]))
    (-0.448, 0.048)
    """
    mean, error = mean_and_error(differences)
    assert error is not None
    half = float(student_t.ppf((1 + LEVEL) / 2, len(differences) - 1)) * error
    return mean - half, mean + half


@dataclass(frozen=True)
class Summary:
    """The runs of one configuration."""

    number: int
    settings: dict[str, str]
    records: tuple[Record, ...]  # of the seeds that have ended, in their order
    metric: str

    @cached_property
    def by_seed(self) -> dict[int, float]:
        """The metric of each finished run."""
        return {
            record.seed: getattr(record.losses, self.metric)
            for record in self.records
            if record.finished
        }

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.problem]

    @property
    def stopped_at(self) -> int | None:
        """The step at which successive halving has stopped this configuration."""
        steps = [r.losses.step for r in self.records if r.losses and not (r.finished or r.problem)]
        return min(steps, default=None)

    @property
    def mean(self) -> float:
        """The mean of the metric over finished runs; infinite if there is none."""
        values = self.by_seed.values()
        return math.fsum(values) / len(values) if values else math.inf

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None for less than two finished runs."""
        return mean_and_error(list(self.by_seed.values()))[1] if self.by_seed else None

    @property
    def order(self) -> tuple[bool, bool, float]:
        """The place in the table: whole ones by their mean, then stopped and then failed ones."""
        partial = [getattr(r.losses, self.metric) for r in self.records if r.losses]
        mean = self.mean if self.by_seed else min(partial, default=math.inf)
        return bool(self.failed), not self.by_seed, mean

    def cell(self, metric: str) -> str:
        """Return the mean and standard error of a metric over finished runs."""
        finished = [r.losses for r in self.records if r.losses and r.finished]
        stopped = [r.losses for r in self.records if r.losses and not r.problem]
        values = [getattr(losses, metric) for losses in finished or stopped]
        if not values:
            return ""
        mean, error = mean_and_error(values)
        return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"

    @property
    def note(self) -> str:
        """Return a note on runs that have not all steps."""
        if self.failed:
            reason = self.failed[0].problem
            short = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…"
            return f"{len(self.failed)} failed: {short}"
        if self.stopped_at is not None:
            return f"stopped at step {self.stopped_at:,}"
        return "" if self.records else "not trained"


def summaries(study: Study, metric: str) -> list[Summary]:
    """Return a summary of each configuration, the best first."""
    found = []
    for index, configuration in enumerate(study.configurations, 1):
        records = tuple(record for key, record in study.records.items() if key[0] == index)
        records = tuple(sorted(records, key=lambda record: record.seed))
        found.append(Summary(index, configuration.settings, records, metric))
    return sorted(found, key=lambda summary: summary.order)


# ---- the table ----


def table(title: str, axes: Iterable[Axis], rows: Sequence[Summary]) -> Table:
    """Return a row for each configuration, with mean ± standard error over its seeds."""
    keys = [axis.key for axis in axes]
    labels = ["", *keys, "note", "runs", "best loss", "last loss", "best bpb", "last bpb", "time"]
    cells = []
    for row in rows:
        times = [record.seconds for record in row.records if record.finished]
        cells.append(
            [
                str(row.number),
                *(row.settings[key] for key in keys),
                row.note,
                str(len(row.by_seed)),
                *(row.cell(metric) for metric in METRICS),
                as_clock(sum(times) / len(times)) if times else "",
            ]
        )
    return make_table(title, labels, cells, n_text=2 + len(keys))


# ---- the verdict ----


def verdict(rows: Sequence[Summary]) -> str:
    """Name the winner, or say why there is none; rows: the best first."""
    compared = [row for row in rows if row.by_seed and not row.failed]
    if not compared:
        return "no winner: no configuration has finished without a failure"
    failed = [describe(row.settings) for row in rows if row.failed]
    without = f"; not compared, as a run failed: {', '.join(failed)}" if failed else ""
    return compare(compared) + without


def compare(compared: Sequence[Summary]) -> str:
    """Name the winner of configurations without a failure, or say why there is none."""
    first, rivals = compared[0], compared[1:]
    name = describe(first.settings)
    if not rivals:
        return f"best: {name}, the only configuration that was trained to the end"
    intervals = {}
    for rival in rivals:
        common = sorted(first.by_seed.keys() & rival.by_seed.keys())
        if len(common) < 2:
            return (
                f"lowest mean: {name}. No winner: {describe(rival.settings)} has not two seeds in "
                "common with it, and without them there is no interval; add --seeds 3"
            )
        differences = [first.by_seed[seed] - rival.by_seed[seed] for seed in common]
        intervals[rival.number] = paired_interval(differences)
    tied = [rival for rival in rivals if intervals[rival.number][1] >= 0]
    if tied:
        behind = "; ".join(
            f"{describe(r.settings)} {format_interval(intervals[r.number], '+.4f')}" for r in tied
        )
        return (
            f"lowest mean: {name}. No winner: the paired 95 % interval of the difference "
            f"includes zero for {behind}"
        )
    nearest = max(rivals, key=lambda rival: intervals[rival.number][1])
    interval = format_interval(intervals[nearest.number], "+.4f")
    return (
        f"winner: {name}, below every other by the paired 95 % interval; the nearest is "
        f"{describe(nearest.settings)} {interval}"
    )


def edges(axes: Iterable[Axis], rows: Sequence[Summary]) -> list[str]:
    """Return a hint for each numeric key whose best value is the smallest or largest tried."""
    finished = [row for row in rows if row.by_seed and not row.failed]
    hints = []
    for axis in axes:
        tried = numbers(row.settings[axis.key] for row in rows)
        if not finished or len(set(tried)) < 2:
            continue
        best = finished[0].settings[axis.key]
        for extreme, word in ((min(tried), "smallest"), (max(tried), "largest")):
            if number(best) == extreme:
                hints.append(
                    f"{axis.key}={best} is the {word} value tried: the best one may lie beyond"
                )
    return hints


def numbers(texts: Iterable[str]) -> list[float]:
    """Return the texts as numbers; nothing if one of them is none.

    >>> numbers(["1e-3", "2"]), numbers(["1", "auto"])
    ([0.001, 2], [])
    """
    try:
        return [number(text) for text in texts]
    except ValueError:
        return []


# ---- every run ----


def write_csv(study: Study, path: Path) -> None:
    """Write a row for each run that has ended."""
    keys = [axis.key for axis in study.axes]
    fields = ["run", *keys, "seed", "seconds", "finished", "problem", "step", *METRICS]
    with atomic_write(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for key, record in sorted(study.records.items()):
            settings = study.configuration(key[0]).settings
            row: dict[str, object] = {"run": study.run(key).name, **settings}
            row |= {name: getattr(record, name) for name in ("seed", "seconds", "problem")}
            row["finished"] = int(record.finished)
            writer.writerow(row | (asdict(record.losses) if record.losses else {}))
