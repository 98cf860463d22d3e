"""Training speed: real runs of train.py, other programs on the same shapes, the parts of a step."""

import argparse
import csv
import json
import platform
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from benchmarks.configs import load_absolute, write_config
from benchmarks.measure import OUT, ROOT, parse_peers, run_watched
from benchmarks.peers import PEERS, Shape, check_peers, step_times
from pocketlm.config.loading import load_config
from pocketlm.config.sections import Config
from pocketlm.data.loaders import resolve_max_steps
from pocketlm.data.prepare import PreparedData, prepare
from pocketlm.hardware.devices import Hardware, choose_hardware, with_compile
from pocketlm.hardware.measure import device_name, matmul_rate
from pocketlm.hardware.scaling import CARDS
from pocketlm.instruction_sets import multiplies_bfloat16
from pocketlm.training.plan import compilable_seconds, tokens_per_step

WARMUP = 2  # intervals, or steps of a peer, that do not count


@dataclass
class Times:
    """Seconds per step and memory of each contender, over its runs."""

    seconds: dict[str, list[float]] = field(default_factory=dict)  # the median of each run
    megabytes: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, seconds: list[float], megabytes: float) -> None:
        """Add a run."""
        self.seconds.setdefault(name, []).append(statistics.median(seconds))
        self.megabytes[name] = max(megabytes, self.megabytes.get(name, 0))


@dataclass(frozen=True)
class Task:
    """The training of all contenders: the config, and what train.py derives from it."""

    written: Config  # as the user wrote it, with absolute paths
    config: Config  # with the size of the vocabulary and the number of steps
    data: PreparedData
    hardware: Hardware

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return tokens_per_step(self.config)


def our_command(
    program: Path, task: Task, steps: int, folder: Path, overrides: Sequence[str] = ()
) -> list[str]:
    """Return the command of a run of so many steps, which logs ten times.

    It saves only at the end, and compiles if the whole run would.
    """
    return [
        *(sys.executable, str(program)),
        *("--config", str(write_config(task.written, folder)), "--fresh"),
        f"training.max_steps={steps}",
        f"training.val_every_steps={steps}",
        f"training.save_every_steps={steps}",
        f"training.log_every_steps={max(1, steps // 10)}",
        "run.name=bench",
        f"hardware.compile={'on' if task.hardware.compile else 'off'}",
        *overrides,
    ]


def our_run(
    task: Task, steps: int, folder: Path, overrides: Sequence[str] = ()
) -> tuple[list[float], float]:
    """Return the seconds per step in each interval that train.py logged, and its memory in MB."""
    command = our_command(ROOT / "train.py", task, steps, folder, overrides)
    finished = run_watched(command, folder)
    with (folder / "logs" / "bench" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["perf/tokens_per_second"]]
    seconds = []
    for before, after in zip(rows, rows[1:], strict=False):
        tokens = float(after["tokens"]) - float(before["tokens"])
        steps_between = float(after["step"]) - float(before["step"])
        seconds.append(tokens / float(after["perf/tokens_per_second"]) / steps_between)
    return seconds[min(WARMUP, len(seconds) - 1) :], finished.megabytes


def prepare_task(path: str, overrides: list[str]) -> Task:
    """Prepare the data, and resolve the config as train.py does."""
    written = load_absolute(path, overrides)
    hardware = choose_hardware(written.hardware, written.training.precision)
    data = prepare(written.data)
    config = written.with_vocab_size(data.tokenizer.vocab_size)
    config = resolve_max_steps(config, data, hardware.precision)
    seconds = compilable_seconds(config, hardware)
    hardware = with_compile(hardware, config.hardware.compile, seconds)
    return Task(written, config, data, hardware)


def bench_train(args: argparse.Namespace) -> int:
    """Run ours and the peers in turn; print medians, ratios and the parts of one of our steps."""
    peers = parse_peers(args.peer)
    check_peers(peers, load_config(args.config, args.overrides).model)
    task = prepare_task(args.config, args.overrides)
    config, hardware = task.config, task.hardware
    shape = Shape(config, task.data, hardware.accelerator, hardware.precision, args.peer_steps)
    times = Times()
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            times.add("this", *our_run(task, args.steps, Path(folder)))
        for name, path in peers.items():
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                title, finished = PEERS[name](path, shape, Path(folder))
            times.add(title, step_times(finished)[WARMUP:], finished.megabytes)
    OUT.print(
        f"{args.config} {' '.join(args.overrides)}: {config.model.n_parameters:,} parameters, "
        f"{task.tokens:,} tokens a step, {device_name(hardware.accelerator)}, {platform.platform()}"
    )
    OUT.print(times_table(times, hardware, task.tokens))
    print_flops(config, hardware, task.tokens / statistics.median(times.seconds["this"]))
    if args.parts:
        print_parts(task, args.steps, args.work)
    return 0


def times_table(times: Times, hardware: Hardware, tokens: int) -> Table:
    """Return a table with a row for each contender."""
    table = Table(box=None)
    for column in ("", "ms a step", "tokens/s", "this is", "private MB", "each, ms"):
        table.add_column(column, justify="right" if column else "left")
    ours = statistics.median(times.seconds["this"])
    compiled = "compiled" if hardware.compile else "eager"
    for name, runs in times.seconds.items():
        median = statistics.median(runs)
        title = f"this, {hardware.precision}, {compiled}" if name == "this" else name
        table.add_row(
            title,
            f"{median * 1e3:.4g}",
            f"{tokens / median:,.0f}",
            "" if name == "this" else f"{median / ours:.2f}x {name.split()[0]}",
            f"{times.megabytes[name]:,.0f}",
            " ".join(f"{seconds * 1e3:.4g}" for seconds in runs),
        )
    return table


def print_flops(config: Config, hardware: Hardware, tokens_per_second: float) -> None:
    """Print the model's FLOP/s beside the rate of a matmul measured now, and MFU on known GPUs."""
    flops = config.model.flops_per_token(config.training.seq_len) * tokens_per_second
    shares, kinds = [], {"float32": "32-true"}
    if multiplies_bfloat16(hardware.accelerator):  # else it is emulated, and takes minutes
        kinds["bfloat16"] = "bf16-mixed"
    for kind, precision in kinds.items():
        peak = matmul_rate(hardware.accelerator, precision)
        shares.append(f"{flops / peak:.0%} of the {peak / 1e9:,.0f} GFLOP/s of a {kind} matmul")
    OUT.print(f"{flops / 1e9:,.0f} GFLOP/s in the model: {', '.join(shares)}, measured now")
    for name, card in CARDS.items():
        if hardware.accelerator == "cuda" and re.search(rf"\b{name}\b", device_name("cuda")):
            stated = f"{card.peak / 1e12:,.0f} TFLOP/s that its maker states for bfloat16"
            OUT.print(f"MFU {flops / card.peak:.1%} of the {stated}")


def print_parts(task: Task, steps: int, work: Path | None) -> None:
    """Print the time of each part of a step, from one more run with clocks in it."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "clocked.json"
        command = our_command(Path(__file__).parent / "clocked.py", task, steps, Path(folder))
        run_watched([*command[:2], str(out), *command[2:]], Path(folder))
        clocked = json.loads(out.read_text())
    micro_batch = statistics.median(clocked["steps"][WARMUP:]) * 1e3
    parts = {
        name: statistics.median(seconds[WARMUP:]) * 1e3
        for name, seconds in clocked["parts"].items()
        if name != "logging"
    }
    run_steps = len(clocked["parts"]["clip"])
    micro_batches = len(clocked["parts"]["backward"]) / run_steps  # per step
    for name in ("data", "forward", "backward"):
        parts[name] *= micro_batches
    # Most steps log nothing, so the mean is what counts.
    parts["logging"] = sum(clocked["parts"]["logging"]) / run_steps * 1e3
    parts["Lightning and the rest"] = micro_batch * micro_batches - sum(parts.values())
    OUT.print("a step, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items()))
    OUT.print(
        f"first step {clocked['first']:.1f} s after the start of the process; "
        f"{clocked['megabytes']:,.0f} MB private while training, of which imports "
        f"{clocked['imports']:,.0f} MB"
    )
