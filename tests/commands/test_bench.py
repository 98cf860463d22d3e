"""The benchmarks run, and what they compare does the same work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from model import Transformer
from pocketlm.checkpoint.format import checkpoint_metadata, save_checkpoint
from pocketlm.config.loading import config_from_dict
from pocketlm.tokenizer.bytes import ByteTokenizer

ROOT = Path(__file__).parents[2]
TINY = ["model.n_layers=1", "model.d_model=16", "training.seq_len=16", "data.tokenizer=byte"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "bench.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.fixture
def text(tmp_path: Path) -> str:
    """An override that reads a file of sums, 30 KB and more."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    return f"data.path={path}"


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A checkpoint of a small model with random weights."""
    path = tmp_path / "small.ckpt"
    tokenizer = ByteTokenizer()
    sizes = {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}
    sizes["vocab_size"] = tokenizer.vocab_size
    sections = {"model": sizes, "data": {"tokenizer": "byte"}, "training": {"seq_len": 64}}
    config = config_from_dict(sections)
    weights = {f"model.{name}": p for name, p in Transformer(config.model).state_dict().items()}
    kit = checkpoint_metadata(config, tokenizer.state(), tokens=1, val_loss=None)
    save_checkpoint({"state_dict": weights, "global_step": 1, "kit": kit}, path)
    return str(path)


@pytest.mark.slow
def test_the_preparations_that_are_compared_make_the_same_tokens(tmp_path):
    """Ours has an eos before the first document of each part; both have one after each document."""
    done = bench("prepare", "--mb", "1", "--repeat", "1", "--work", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^ (\S.*?) {2,}(.*)$", done.stdout, re.MULTILINE))
    header = re.search(r"whole process.*", done.stdout)[0]
    position = re.split(r"  +", header.strip()).index("tokens")
    cells = {name: re.split(r"  +", row.strip()) for name, row in rows.items()}
    ours, theirs = (
        number(cells[name][position]) for name in ("this, gpt2", "datasets.map + tiktoken")
    )
    assert ours == theirs + 2 > 200_000
    assert len(re.findall(r"reading (?:shards|a stream): [\d.]+ M tokens/s", done.stdout)) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_loader_is_compared_with_the_training_it_feeds(tmp_path, text):
    options = ["--steps", "60", "--work", str(tmp_path), text, *TINY, "training.warmup_steps=2"]
    done = bench("loader", *options)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"training takes [\d,]+ tokens/s\n"
        r"  the loader alone, 0 workers: [\d,]+ tokens/s, \d+ times\n",
        done.stdout,
    )


def test_a_peer_that_is_not_known_is_refused():
    done = bench("prepare", "--peer", "gptnano=x")
    assert (done.returncode, done.stdout) == (2, "")
    message = "error: --peer gptnano=x: the peer here is nanogpt=PATH, a checkout of it\n"
    assert done.stderr == message


@pytest.mark.parametrize(
    "peer, why",
    [
        pytest.param(
            "gptnano=x",
            "--peer gptnano: the peers are nanogpt=PATH, llmc=PATH, litgpt=PATH, transformers",
            id="not known",
        ),
        pytest.param(
            "nanogpt=x",
            "--peer nanogpt=x: there is no train.py in it; give a checkout of nanogpt",
            id="no checkout",
        ),
        pytest.param(
            "llmc=.",
            "--peer llmc trains GPT-2 only; give it a config of that kind, "
            "such as presets/gpt2_124m.yaml",
            id="llm.c on a Llama",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_peer_that_cannot_train_is_refused(tmp_path, text, peer, why):
    (tmp_path / "train_gpt2.c").write_text("")
    peer = peer.replace("=.", f"={tmp_path}")
    settings = [text, "data.tokenizer=byte", "training.seq_len=16", f"data.cache_dir={tmp_path}"]
    options = ["--steps", "3", "--repeat", "1", "--peer", peer, "--work", str(tmp_path)]
    done = bench("train", *options, *settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"error: {why}"


@pytest.mark.slow
def test_training_is_compared_with_transformers_and_its_steps_are_timed_in_parts(tmp_path, text):
    options = ["--steps", "30", "--peer-steps", "6", "--repeat", "1", "--parts"]
    options += ["--peer", "transformers", "--work", str(tmp_path)]
    done = bench("train", *options, text, *TINY, f"data.cache_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        float(re.search(rf"^ {name}.*? {{2,}}([\d.]+) ", done.stdout, re.MULTILINE)[1])
        for name in ("this", "transformers")
    )
    ratio = float(re.search(r"([\d.]+)x transformers", done.stdout)[1])
    # The table's figures are rounded.
    assert ratio == pytest.approx(theirs / ours, abs=0.01 + 0.005 * ratio)
    named = r"(data|forward|backward|clip|optimizer|logging|Lightning and the rest) (-?[\d.]+)"
    parts = {name: float(ms) for name, ms in re.findall(named, done.stdout)}
    assert len(parts) == 7
    assert all(parts[name] > 0 for name in ("forward", "backward", "clip", "optimizer"))
    assert re.search(r"first step [\d.]+ s after the start of the process", done.stdout)


def test_the_servers_clients_are_counted(small):
    options = ["--dtypes", "float32", "--clients", "3", "--tokens", "4", "--repeat", "2"]
    done = bench("serve", "--ckpt", small, *options)
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"float32, (streaming|whole) +([\d,]+) +(\d+) (\d+) +([\d,]+) +(\d+) (\d+) +([\d.]+)",
        done.stdout,
    )
    assert [row[0] for row in rows] == ["streaming", "whole"]
    for _, *cells in rows:
        one, first, second, many, third, fourth, ratio = map(number, cells)
        assert one == pytest.approx((first + second) / 2, abs=1)
        assert many == pytest.approx((third + fourth) / 2, abs=1)
        assert ratio == pytest.approx(many / one, abs=0.0051 + ratio * (0.51 / one + 0.51 / many))


def test_a_server_that_does_not_start_is_reported():
    done = bench("serve", "--ckpt", "README.md")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: serve.py did not start: README.md")


def test_generation_is_compared_with_transformers_on_the_same_weights(small):
    options = ["--beside", "float32", "--dtypes", "float32", "int8", "--torch"]
    options += ["--tokens", "8", "--batch", "3", "--repeat", "2"]
    done = bench("generate", "--ckpt", small, *options)
    assert done.returncode == 0, done.stderr
    rows = [
        re.match(r" *(\S.*?) {2,}([\d.,]+) +([\d.]+)x +(\d+)% +([\d.]+) ([\d.]+) ", line)
        for line in done.stdout.splitlines()
    ]
    rates = {row[1]: number(row[2]) for row in rows if row}
    ratios = {row[1]: float(row[3]) for row in rows if row}
    assert list(rates) == [
        "transformers, float32",
        "this, float32, in C",
        "this, int8, in C",
        "this, bfloat16, in torch",
    ]
    theirs = rates["transformers, float32"]
    for name, ratio in ratios.items():
        # Ratios have two digits after the point, rates one.
        rounding = 0.0051 + ratio * (0.051 / rates[name] + 0.051 / theirs)
        assert ratio == pytest.approx(rates[name] / theirs, abs=rounding)
