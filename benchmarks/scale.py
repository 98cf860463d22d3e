"""Training on several processes: what more of them gain, and what they lose to communication.

All runs have the same rows of a step. On a CPU each process has one thread, so that the ideal is as
many times the speed of one as there are processes. To tell what they lose to each other's use of
the memory and the caches from what they lose to communication, as many runs with the rows of one
process each, which do not communicate, are timed side by side as well.
"""

import argparse
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from benchmarks.measure import OUT, machine
from benchmarks.train import Task, Times, our_run, prepare_task

APART = "without communication"


def bench_scale(args: argparse.Namespace) -> int:
    """Run each number of processes in turn; print speeds, efficiency and shares."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs: this process has read it already
    task = prepare_task(args.config, [*args.overrides, "hardware.devices=1"])
    ranks = sorted({1, *args.ranks})
    shares = {count: share_of_one(task, count) for count in ranks}
    times = Times()
    for _ in range(args.repeat):
        for count in ranks:
            for strategy in args.strategies if count > 1 else ["single"]:
                with tempfile.TemporaryDirectory(dir=args.work) as folder:
                    keys = [f"hardware.devices={count}"]
                    keys += [f"hardware.strategy={strategy}"] if count > 1 else []
                    times.add(f"{strategy} {count}", *our_run(task, args.steps, Path(folder), keys))
            if count > 1:
                times.add(f"{APART} {count}", *run_apart(task, args, count, shares[count]))
    rows = task.config.training.micro_batch * task.config.training.grad_accum_steps
    OUT.print(
        f"{args.config} {' '.join(args.overrides)}: {task.config.model.n_parameters:,} parameters, "
        f"{rows} rows, {task.tokens:,} tokens a step, {task.hardware.precision}, "
        f"one thread each, {machine()}"
    )
    OUT.print(scale_table(times, task.tokens))
    return 0


def share_of_one(task: Task, count: int) -> list[str]:
    """Return the keys of a run with the rows of one of `count` processes. Raises UserError."""
    hardware = replace(task.config.hardware, devices=count)
    share = replace(task.config, hardware=hardware).on_each_device().training
    return [
        f"training.micro_batch_size={share.micro_batch}",
        f"training.grad_accum_steps={share.grad_accum_steps}",
    ]


def run_apart(
    task: Task, args: argparse.Namespace, count: int, share: list[str]
) -> tuple[list[float], float]:
    """Run `count` runs with their share of the rows side by side.

    Return the seconds of a step in each interval of all of them, and the memory of all in MB.
    """
    with ExitStack() as opened, ThreadPoolExecutor(count) as pool:
        folders = [
            Path(opened.enter_context(tempfile.TemporaryDirectory(dir=args.work)))
            for _ in range(count)
        ]
        runs = list(pool.map(lambda folder: our_run(task, args.steps, folder, share), folders))
    return [seconds for run, _ in runs for seconds in run], sum(memory for _, memory in runs)


def scale_table(times: Times, tokens: int) -> Table:
    """Return a table with a row for each number of processes and strategy.

    Efficiency: speed beside the ideal. Communication: share of a step that the same work takes
    longer than without it.
    """
    table = Table(box=None)
    names = (
        "processes",
        "ms a step",
        "tokens/s",
        "ideal",
        "efficiency",
        "communication",
        "MB each",
    )
    for column in ("", *names, "each run, ms"):
        table.add_column(column, justify="right" if column else "left")
    alone = statistics.median(times.seconds["single 1"])
    for name, runs in times.seconds.items():
        kind, _, number = name.rpartition(" ")
        count, median = int(number), statistics.median(runs)
        ideal = alone / count
        share = ""
        if count > 1 and kind != APART:
            apart = statistics.median(times.seconds[f"{APART} {number}"])
            share = f"{1 - apart / median:.0%}"
        table.add_row(
            kind,
            number,
            f"{median * 1e3:.4g}",
            f"{tokens / median:,.0f}",
            f"{tokens / ideal:,.0f}",
            f"{ideal / median:.0%}",
            share,
            f"{times.megabytes[name] / count:,.0f}",
            " ".join(f"{seconds * 1e3:.4g}" for seconds in runs),
        )
    return table
