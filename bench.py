"""Measure, beside other programs on the same machine and in the same run.

    python bench.py train --config presets/shakespeare_char_cpu.yaml --peer nanogpt=PATH    # real runs of both, in turn
    python bench.py train --config presets/gpt2_124m.yaml --peer llmc=PATH --peer transformers
    python bench.py prepare --mb 10 100                       # prepare and read text of these sizes, made out of the wiki corpus
    python bench.py prepare --mb 10 100 --peer nanogpt=PATH   # beside a checkout of nanoGPT, whose script runs as it is
    python bench.py loader --config config.yaml               # the loader alone, beside the training that it feeds
    python bench.py probes --cases cases/grammar.yaml         # scoring probes, beside a loop over the candidates
    python bench.py generate --ckpt checkpoints/final.ckpt    # generation, beside transformers on the same weights
    python bench.py serve --ckpt checkpoints/final.ckpt       # the server: one client, and 16 at once

Memory is the highest sum of private (anonymous) memory of a process and its children, sampled while it runs. Contenders take
turns, `--repeat` times; the median is shown with all of them. Each subject is a file of benchmarks/.
"""

import argparse
from importlib import import_module

from pocketlm.errors import run_main


def runs(module: str, function: str):
    """A command that imports what it needs only when it is the one asked for."""
    return lambda args: getattr(import_module(f"benchmarks.{module}"), function)(args)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure this program, beside others.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="training speed, beside other programs on the same shapes"
    )
    train.add_argument("--config", default="config.yaml")
    train.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a checkout: nanogpt=PATH, llmc=PATH, litgpt=PATH; or transformers",
    )
    train.add_argument(
        "--steps",
        type=int,
        default=50,
        help="optimizer steps of a run of ours (default %(default)s)",
    )
    train.add_argument(
        "--peer-steps", type=int, default=10, help="steps of a peer's run (default %(default)s)"
    )
    train.add_argument("--repeat", type=int, default=3, help="runs of each (default %(default)s)")
    train.add_argument("--parts", action="store_true", help="and where the time of a step goes")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.set_defaults(run=runs("train", "bench_train"))
    prepare = commands.add_parser(
        "prepare", help="text to token shards, beside datasets.map and nanoGPT, and reading them"
    )
    prepare.add_argument(
        "--mb", type=int, nargs="+", default=[10, 100], help="sizes of text, in MB (default 10 100)"
    )
    prepare.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="nanogpt=PATH",
        help="a checkout to run beside",
    )
    prepare.add_argument("--repeat", type=int, default=3, help="runs of each (default %(default)s)")
    prepare.set_defaults(run=runs("data", "bench_prepare"))
    loader = commands.add_parser(
        "loader", help="the loader alone, beside the training that it feeds"
    )
    loader.add_argument("--config", default="config.yaml")
    loader.add_argument(
        "--steps",
        type=int,
        default=60,
        help="optimizer steps of training to measure (default %(default)s)",
    )
    loader.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[0],
        help="values of hardware.num_workers (default 0)",
    )
    loader.add_argument("overrides", nargs="*", metavar="section.key=value")
    loader.set_defaults(run=runs("data", "bench_loader"))
    probes = commands.add_parser("probes", help="scoring probes, beside a loop over the candidates")
    probes.add_argument(
        "--ckpt", help="a checkpoint (default: the default run's model, of random weights)"
    )
    probes.add_argument(
        "--cases", nargs="+", default=["cases/*.yaml"], help="suites (default %(default)s)"
    )
    probes.add_argument("--limit", type=int, help="as many cases at most")
    probes.add_argument("--repeat", type=int, default=3, help="runs of ours (default %(default)s)")
    probes.set_defaults(run=runs("probes", "bench_probes"))
    generate = commands.add_parser(
        "generate", help="generation, beside transformers' generate on the same weights"
    )
    generate.add_argument("--ckpt", required=True)
    dtypes = ["float32", "bfloat16", "int8", "int4"]
    generate.add_argument(
        "--dtypes", nargs="*", default=dtypes, choices=dtypes, help="ours (default: all)"
    )
    generate.add_argument(
        "--beside",
        nargs="*",
        default=["bfloat16"],
        choices=dtypes[:2],
        help="transformers' (default: bfloat16)",
    )
    generate.add_argument(
        "--torch", action="store_true", help="and ours with the step in torch, in bfloat16"
    )
    works = ["alone", "batch", "first"]
    generate.add_argument(
        "--works", nargs="+", default=works, choices=works, help="what to time (default: all)"
    )
    generate.add_argument(
        "--tokens", type=int, default=100, help="that each prompt gets (default %(default)s)"
    )
    generate.add_argument(
        "--batch", type=int, default=16, help="prompts of the batch (default %(default)s)"
    )
    generate.add_argument(
        "--repeat", type=int, default=3, help="runs of each (default %(default)s)"
    )
    generate.set_defaults(run=runs("generate", "bench_generate"))
    serve = commands.add_parser("serve", help="the server: one client, and many at once")
    serve.add_argument("--ckpt", required=True)
    serve.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16", "int8"], choices=dtypes
    )
    serve.add_argument(
        "--clients", type=int, default=16, help="that ask at once (default %(default)s)"
    )
    serve.add_argument("--tokens", type=int, default=60, help="of an answer (default %(default)s)")
    serve.add_argument("--repeat", type=int, default=5, help="rounds of each (default %(default)s)")
    serve.set_defaults(run=runs("serve", "bench_serve"))
    for command in (train, prepare, loader):
        command.add_argument("--work", help="a folder for scratch files (default: the system's)")
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    run_main(main)
