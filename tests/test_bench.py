"""The benchmarks run, and what they compare does the same work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "bench.py", *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_the_preparations_that_are_compared_make_the_same_tokens(tmp_path):
    """Ours has an eos before the first document of each part; a document has one behind it in both."""
    done = bench("prepare", "--mb", "1", "--repeat", "1", "--work", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = {name: cells.split() for name, cells in re.findall(r"^ (\S.*?) {2,}(.*)$", done.stdout, re.MULTILINE)}
    ours, theirs = (int(rows[name][5].replace(",", "")) for name in ("this, gpt2", "datasets.map + tiktoken"))
    assert ours == theirs + 2 > 200_000
    assert len(re.findall(r"reading (?:shards|a stream): [\d.]+ M tokens/s", done.stdout)) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_loader_is_set_beside_the_training_it_feeds(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    tiny = ["model.n_layers=1", "model.d_model=16", "training.seq_len=16", "training.warmup_steps=2", "data.tokenizer=byte"]
    done = bench("loader", "--steps", "60", "--work", str(tmp_path), f"data.path={tmp_path / 'text.txt'}", *tiny)
    assert done.returncode == 0, done.stderr
    assert re.search(r"training takes [\d,]+ tokens/s\n  the loader alone, 0 workers: [\d,]+ tokens/s, \d+ times\n", done.stdout)


def test_a_peer_that_is_not_known_is_refused():
    done = bench("prepare", "--peer", "gptnano=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --peer gptnano=x: the peer here is nanogpt=PATH, a checkout of it\n"
