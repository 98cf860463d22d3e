"""Training speed: real runs of train.py, beside other programs on the same shapes, and where the time of a step goes."""

import argparse
import csv
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path

from rich.table import Table

from benchmarks.measure import OUT, ROOT, run_watched
from benchmarks.peers import PEERS, Shape, step_times
from pocketlm.config.loading import load_config
from pocketlm.data.loaders import with_steps
from pocketlm.data.prepare import prepare
from pocketlm.errors import UserError
from pocketlm.hardware.devices import choose_hardware, with_compile
from pocketlm.hardware.measure import device_name, matmul_rate
from pocketlm.training.plan import seconds_outside_head, tokens_per_step

GPU_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "4090": 165e12,
}  # bf16, dense, as their makers state
WARMUP = 2  # intervals, or a peer's steps, that do not count


def our_command(program: Path, args: argparse.Namespace, every: int) -> list[str]:
    """A run of so many steps, without checkpoints on the way and with the config's own cache; compiled if the whole run would be."""
    cache = (ROOT / load_config(args.config, args.overrides).data.cache_dir).resolve()
    keys = {
        "max_steps": args.steps,
        "val_every_steps": args.steps,
        "save_every_steps": args.steps,
        "log_every_steps": every,
    }
    settings = [
        *(f"training.{key}={value}" for key, value in keys.items()),
        f"data.cache_dir={cache}",
        "run.name=bench",
        f"hardware.compile={args.compile}",
    ]
    return [
        sys.executable,
        str(program),
        "--config",
        str(Path(args.config).resolve()),
        "--fresh",
        *args.overrides,
        *settings,
    ]


def our_run(args: argparse.Namespace, folder: Path) -> tuple[list[float], float]:
    """Seconds of a step in each interval that train.py logged, and the run's private memory in MB."""
    every = max(1, args.steps // 10)
    done = run_watched(our_command(ROOT / "train.py", args, every), folder)
    with (folder / "logs" / "bench" / "metrics.csv").open(newline="") as file:
        rows = [
            {k: float(v) for k, v in row.items() if v}
            for row in csv.DictReader(file)
            if row["perf/tokens_per_second"]
        ]
    pairs = zip(rows, rows[1:], strict=False)
    seconds = [
        (b["tokens"] - a["tokens"]) / b["perf/tokens_per_second"] / (b["step"] - a["step"])
        for a, b in pairs
    ]
    return seconds, done.megabytes


def imports_megabytes(code: str) -> float:
    """Private memory of a process that only imports."""
    return run_watched(
        [sys.executable, "-c", f"{code}; import time; time.sleep(0.3)"], ROOT, every=0.05
    ).megabytes


def bench_train(args: argparse.Namespace) -> int:
    """Interleaved runs, their medians and the ratios; then the parts of one of our steps."""
    config = load_config(args.config, args.overrides)
    hardware = choose_hardware(config.hardware, config.training.precision)
    data = prepare(config.data)
    config = with_steps(config.with_vocab_size(data.tokenizer.vocab_size), data)
    hardware = with_compile(
        hardware, config.hardware.compile, seconds_outside_head(config, hardware)
    )
    args.compile = "on" if hardware.compile else "off"
    shape = Shape(config, data, hardware.accelerator, hardware.precision, args.peer_steps)
    peers = dict(peer.partition("=")[::2] for peer in args.peer)
    for name in peers:
        if name not in PEERS:
            raise UserError(
                f"--peer {name}: the peers are {', '.join(f'{peer}=PATH' for peer in PEERS if peer != 'transformers')}, transformers"
            )
    times: dict[str, list[float]] = {"this": []}  # median seconds of a step, a run
    memory: dict[str, float] = {}
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            seconds, megabytes = our_run(args, Path(folder))
        times["this"].append(statistics.median(seconds[min(WARMUP, len(seconds) - 1) :]))
        memory["this"] = max(megabytes, memory.get("this", 0))
        for name, path in peers.items():
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                called, done = PEERS[name](path, shape, Path(folder))
            times.setdefault(called, []).append(statistics.median(step_times(done)[WARMUP:]))
            memory[called] = max(done.megabytes, memory.get(called, 0))
    tokens = tokens_per_step(config)
    OUT.print(
        f"{args.config} {' '.join(args.overrides)}: {config.model.n_parameters:,} parameters, {tokens:,} tokens a step, "
        f"{device_name(hardware.accelerator)}, {platform.system()}"
    )
    table = Table(box=None)
    for column in ("", "ms a step", "tokens/s", "this is", "private MB", "each, ms"):
        table.add_column(column, justify="right" if column else "left")
    ours = statistics.median(times["this"])
    for name, its in times.items():
        median = statistics.median(its)
        called = (
            f"this, {hardware.precision}, {'compiled' if hardware.compile else 'eager'}"
            if name == "this"
            else name
        )
        ratio = "" if name == "this" else f"{median / ours:.2f}x {name.split()[0]}"
        each = " ".join(f"{t * 1e3:.4g}" for t in its)
        table.add_row(
            called,
            f"{median * 1e3:.4g}",
            f"{tokens / median:,.0f}",
            ratio,
            f"{memory[name]:,.0f}",
            each,
        )
    OUT.print(table)
    ours_alone, torch_alone = (
        imports_megabytes("import train, matplotlib.pyplot"),
        imports_megabytes("import torch"),
    )
    OUT.print(
        f"of the memory are imports: {ours_alone:,.0f} MB of train.py and its picture, {torch_alone:,.0f} MB of torch alone"
    )
    flops = config.model.flops_per_token(config.training.seq_len) * tokens / ours
    peaks = {
        kind: matmul_rate(hardware.accelerator, precision)
        for kind, precision in (("float32", "32-true"), ("bfloat16", "bf16-mixed"))
    }
    measured = ", ".join(
        f"{flops / peak:.0%} of the {peak / 1e9:,.0f} GFLOP/s of a {kind} matmul"
        for kind, peak in peaks.items()
    )
    OUT.print(f"{flops / 1e9:,.0f} GFLOP/s in the model: {measured}, both measured now")
    for card, peak in GPU_PEAKS.items():
        if hardware.accelerator == "cuda" and card in device_name("cuda"):
            OUT.print(
                f"MFU {flops / peak:.1%} of the {peak / 1e12:,.0f} TFLOP/s that its maker states for bfloat16"
            )
    if args.parts:
        print_parts(args)
    return 0


def print_parts(args: argparse.Namespace) -> None:
    """Where the time of a step goes, in one more run with clocks in it."""
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        out = Path(folder) / "clocked.json"
        command = our_command(Path(__file__).parent / "clocked.py", args, max(1, args.steps // 10))
        run_watched([*command[:2], str(out), *command[2:]], Path(folder))
        clocked = json.loads(out.read_text())
    step = statistics.median(clocked["steps"][WARMUP:]) * 1e3
    parts = {
        name: statistics.median(its[WARMUP:]) * 1e3
        for name, its in clocked["parts"].items()
        if name != "logging"
    }
    steps = len(clocked["parts"]["clip"])
    for name in ("data", "forward", "backward"):  # of each micro-batch
        parts[name] *= len(clocked["parts"]["backward"]) / steps
    parts["logging"] = sum(clocked["parts"]["logging"]) / steps * 1e3  # most steps log nothing
    parts["Lightning and the rest"] = step * len(clocked["parts"]["backward"]) / steps - sum(
        parts.values()
    )
    OUT.print("a step, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items()))
    OUT.print(
        f"first step {clocked['first']:.1f} s after the start of the process; {clocked['megabytes']:,.0f} MB private while training"
    )
