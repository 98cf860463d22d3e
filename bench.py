"""Benchmarks: this program and others on the same machine, in the same run.

    python bench.py train --config presets/shakespeare_char_cpu.yaml --peer nanogpt=PATH
    python bench.py train --config presets/gpt2_124m.yaml --peer llmc=PATH --peer transformers
    python bench.py scale --ranks 1 2                         # training on several CPU processes
    python bench.py prepare --mb 10 100                       # prepare and read text of these sizes
    python bench.py prepare --mb 10 100 --peer nanogpt=PATH   # and nanoGPT's own script on it
    python bench.py loader --config config.yaml               # the loader and the training it feeds
    python bench.py probes --cases cases/grammar.yaml         # probe scoring and a plain loop
    python bench.py generate --ckpt checkpoints/final.ckpt    # generation and transformers'
    python bench.py serve --ckpt checkpoints/final.ckpt       # the server: one client, 16 at once
    python bench.py memory                                    # what plans tell, and the peaks
    python bench.py convert --ckpt checkpoints/final.ckpt     # each conversion, proven, and back
    python bench.py generate --ckpt checkpoints/final.ckpt --isa avx2 --isa avx512_bf16

`--isa` makes all contenders keep to an instruction set, as on a CPU that has no more.
Memory is the highest sum of the private (anonymous) memory of a process and its children, sampled
while it runs. Contenders take turns, `--repeat` times; tables show the median and every run. Each
benchmark is a file of benchmarks/.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pocketlm.errors import UserError, run_main
from pocketlm.instruction_sets import (
    INSTRUCTION_SETS,
    LIBRARY_VARIABLES,
    VARIABLE,
    available_sets,
)

if TYPE_CHECKING:
    Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DTYPES = ["float32", "bfloat16", "int8", "int4"]
WORKLOADS = ["alone", "batch", "first", "start"]


def lazily(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """Return a command that imports its module when it is called."""

    def run(args: argparse.Namespace) -> int:
        status: int = getattr(import_module(f"benchmarks.{module}"), function)(args)
        return status

    return run


def add_repeat(command: argparse.ArgumentParser, default: int = 3) -> None:
    """Add `--repeat`."""
    command.add_argument(
        "--repeat",
        type=number_from_one,
        default=default,
        help="runs of each contender (default: %(default)s)",
    )


def add_peer(command: argparse.ArgumentParser, metavar: str, help_text: str) -> None:
    """Add `--peer`, which may be repeated."""
    command.add_argument("--peer", action="append", default=[], metavar=metavar, help=help_text)


def add_work(command: argparse.ArgumentParser) -> None:
    """Add `--work`."""
    command.add_argument("--work", type=folder, help="folder for scratch files (default: system's)")


def number_from_one(text: str) -> int:
    """Return an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def folder(path: str) -> Path:
    """Return the absolute path of a folder. Raises UserError if there is none."""
    absolute = Path(path).expanduser().resolve()
    if not absolute.is_dir():
        raise UserError(f"--work {path} is not a folder; create it, or leave --work out")
    return absolute


def isa_parser() -> argparse.ArgumentParser:
    """Return a parser of `--isa`, which may be repeated."""
    parser = argparse.ArgumentParser(add_help=False)
    names = ", ".join(INSTRUCTION_SETS)
    parser.add_argument(
        "--isa",
        action="append",
        default=[],
        metavar="NAME",
        help=f"instruction set of all contenders: {names} (default: what the CPU has)",
    )
    return parser


def add_train(commands: "Commands") -> None:
    """Add `bench.py train`."""
    train = commands.add_parser(
        "train",
        parents=[isa_parser()],
        help="training speed, compared with other programs on the same shapes",
    )
    train.add_argument("--config", default="config.yaml")
    peers = "checkout of another program: nanogpt=PATH, llmc=PATH, litgpt=PATH; or transformers"
    add_peer(train, "NAME=PATH", peers)
    train.add_argument(
        "--steps",
        type=number_from_one,
        default=50,
        help="optimizer steps of our run (default: %(default)s)",
    )
    train.add_argument(
        "--peer-steps",
        type=number_from_one,
        default=10,
        help="steps of a peer's run (default: %(default)s)",
    )
    add_repeat(train)
    train.add_argument("--parts", action="store_true", help="time of each part of a step as well")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_work(train)
    train.set_defaults(run=lazily("train", "bench_train"))


def add_scale(commands: "Commands") -> None:
    """Add `bench.py scale`."""
    scale = commands.add_parser(
        "scale",
        parents=[isa_parser()],
        help="training on several processes: efficiency, and the share of communication",
    )
    scale.add_argument("--config", default="config.yaml")
    scale.add_argument(
        "--ranks",
        type=number_from_one,
        nargs="+",
        default=[1, 2],
        help="numbers of processes, with a thread each, or of GPUs (default: 1 2)",
    )
    scale.add_argument(
        "--strategies",
        nargs="+",
        default=["ddp", "fsdp"],
        choices=["ddp", "fsdp"],
        help="values of hardware.strategy (default: both)",
    )
    scale.add_argument(
        "--steps",
        type=number_from_one,
        default=50,
        help="optimizer steps of a run (default: %(default)s)",
    )
    add_repeat(scale)
    scale.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_work(scale)
    scale.set_defaults(run=lazily("scale", "bench_scale"))


def add_prepare(commands: "Commands") -> None:
    """Add `bench.py prepare`."""
    prepare = commands.add_parser(
        "prepare",
        parents=[isa_parser()],
        help="text to token shards, compared with datasets.map and nanoGPT; reading them",
    )
    prepare.add_argument(
        "--mb",
        type=number_from_one,
        nargs="+",
        default=[10, 100],
        help="sizes of text in MB (default: 10 100)",
    )
    add_peer(prepare, "nanogpt=PATH", "checkout of nanoGPT")
    add_repeat(prepare)
    add_work(prepare)
    prepare.set_defaults(run=lazily("data", "bench_prepare"))


def add_loader(commands: "Commands") -> None:
    """Add `bench.py loader`."""
    loader = commands.add_parser(
        "loader",
        parents=[isa_parser()],
        help="the loader alone, compared with the training that it feeds",
    )
    loader.add_argument("--config", default="config.yaml")
    loader.add_argument(
        "--steps",
        type=number_from_one,
        default=60,
        help="optimizer steps of training to measure (default: %(default)s)",
    )
    loader.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[0],
        help="values of hardware.num_workers (default: 0)",
    )
    loader.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_work(loader)
    loader.set_defaults(run=lazily("data", "bench_loader"))


def add_probes(commands: "Commands") -> None:
    """Add `bench.py probes`."""
    probes = commands.add_parser(
        "probes",
        parents=[isa_parser()],
        help="probe scoring, compared with a loop over the candidates",
    )
    probes.add_argument(
        "--ckpt", help="checkpoint (default: the default run's model with random weights)"
    )
    probes.add_argument(
        "--cases", nargs="+", default=["cases/*.yaml"], help="suites (default: %(default)s)"
    )
    probes.add_argument(
        "--limit", type=number_from_one, help="maximum number of cases (default: all)"
    )
    add_repeat(probes)
    probes.set_defaults(run=lazily("probes", "bench_probes"))


def add_generate(commands: "Commands") -> None:
    """Add `bench.py generate`."""
    generate = commands.add_parser(
        "generate",
        parents=[isa_parser()],
        help="generation, compared with transformers' generate on the same weights",
    )
    generate.add_argument("--ckpt", required=True)
    generate.add_argument(
        "--dtypes", nargs="*", default=DTYPES, choices=DTYPES, help="our dtypes (default: all)"
    )
    generate.add_argument(
        "--beside",
        nargs="*",
        default=["bfloat16"],
        choices=DTYPES[:2],
        help="transformers' dtypes (default: bfloat16)",
    )
    generate.add_argument(
        "--torch",
        action="store_true",
        help="our decoding step in torch as well, in bfloat16 where the CPU multiplies it",
    )
    generate.add_argument(
        "--works",
        nargs="+",
        default=WORKLOADS,
        choices=WORKLOADS,
        help="workloads to time (default: all)",
    )
    generate.add_argument(
        "--tokens",
        type=number_from_one,
        default=100,
        help="new tokens per prompt (default: %(default)s)",
    )
    generate.add_argument(
        "--batch",
        type=number_from_one,
        default=16,
        help="prompts of the batch (default: %(default)s)",
    )
    add_repeat(generate)
    generate.set_defaults(run=lazily("generate", "bench_generate"))


def add_serve(commands: "Commands") -> None:
    """Add `bench.py serve`."""
    serve = commands.add_parser(
        "serve", parents=[isa_parser()], help="the server: one client, and many at once"
    )
    serve.add_argument("--ckpt", required=True)
    serve.add_argument("--dtypes", nargs="+", default=DTYPES[:3], choices=DTYPES)
    serve.add_argument(
        "--clients",
        type=number_from_one,
        default=16,
        help="concurrent clients (default: %(default)s)",
    )
    serve.add_argument(
        "--tokens",
        type=number_from_one,
        default=60,
        help="tokens per answer (default: %(default)s)",
    )
    add_repeat(serve, default=5)
    serve.set_defaults(run=lazily("serve", "bench_serve"))


def add_memory(commands: "Commands") -> None:
    """Add `bench.py memory`."""
    memory = commands.add_parser(
        "memory",
        parents=[isa_parser()],
        help="the memory that a run's plan tells, compared with the peak of its process",
    )
    memory.add_argument(
        "--random",
        type=number_from_one,
        default=0,
        metavar="N",
        help="draw N configs (default: a fixed list)",
    )
    memory.add_argument("--seed", type=int, default=1, help="of --random (default: %(default)s)")
    memory.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_work(memory)
    memory.set_defaults(run=lazily("memory", "bench_memory"))


def add_convert(commands: "Commands") -> None:
    """Add `bench.py convert`."""
    convert = commands.add_parser(
        "convert",
        parents=[isa_parser()],
        help="the proof and the memory of each conversion of a checkpoint, and the way back",
    )
    convert.add_argument("--ckpt", required=True)
    convert.add_argument(
        "--formats", nargs="+", choices=["hf", "gguf", "onnx", "safetensors"], help="default: all"
    )
    add_work(convert)
    convert.set_defaults(run=lazily("convert", "bench_convert"))


def run_with_sets(names: list[str], arguments: list[str]) -> int:
    """Run the benchmark in a new process for each instruction set. Raises UserError.

    The libraries read the variables when a process begins to compute.
    """
    for variable in (VARIABLE, *LIBRARY_VARIABLES):
        os.environ.pop(variable, None)  # --isa replaces what is set
    available = [isa.name for isa in available_sets()]
    for name in names:
        if name not in available:
            raise UserError(f"--isa {name}: this CPU has {', '.join(available)}; name one of these")
    statuses = []
    for name in names:
        command = [sys.executable, __file__, *arguments]
        statuses.append(subprocess.run(command, env=os.environ | {VARIABLE: name}).returncode)
    return next(filter(None, statuses), 0)  # the first that is not zero


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description="Measure this program and compare it with others.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        add_train,
        add_scale,
        add_prepare,
        add_loader,
        add_probes,
        add_generate,
        add_serve,
        add_memory,
        add_convert,
    ):
        add(commands)
    args = parser.parse_args(argv)
    if args.isa:
        _, others = isa_parser().parse_known_args(argv)
        return run_with_sets(args.isa, others)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    run_main(main)
