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


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "bench.py", *arguments], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.slow
def test_the_preparations_that_are_compared_make_the_same_tokens(tmp_path):
    """Ours has an eos before the first document of each part; a document has one behind it in both."""
    done = bench("prepare", "--mb", "1", "--repeat", "1", "--work", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = {
        name: cells.split()
        for name, cells in re.findall(r"^ (\S.*?) {2,}(.*)$", done.stdout, re.MULTILINE)
    }
    ours, theirs = (
        int(rows[name][5].replace(",", "")) for name in ("this, gpt2", "datasets.map + tiktoken")
    )
    assert ours == theirs + 2 > 200_000
    assert len(re.findall(r"reading (?:shards|a stream): [\d.]+ M tokens/s", done.stdout)) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_loader_is_set_beside_the_training_it_feeds(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    tiny = [
        "model.n_layers=1",
        "model.d_model=16",
        "training.seq_len=16",
        "training.warmup_steps=2",
        "data.tokenizer=byte",
    ]
    done = bench(
        "loader",
        "--steps",
        "60",
        "--work",
        str(tmp_path),
        f"data.path={tmp_path / 'text.txt'}",
        *tiny,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"training takes [\d,]+ tokens/s\n  the loader alone, 0 workers: [\d,]+ tokens/s, \d+ times\n",
        done.stdout,
    )


def test_a_peer_that_is_not_known_is_refused():
    done = bench("prepare", "--peer", "gptnano=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "error: --peer gptnano=x: the peer here is nanogpt=PATH, a checkout of it\n"
    )


@pytest.mark.parametrize(
    "peer, why",
    [
        (
            "gptnano=x",
            "--peer gptnano: the peers are nanogpt=PATH, llmc=PATH, litgpt=PATH, transformers",
        ),
        ("nanogpt=x", "--peer nanogpt=x: there is no train.py in it; give a checkout of nanogpt"),
    ],
)
def test_a_peer_to_train_beside_that_is_not_there_is_refused(tmp_path, peer, why):
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(500)))
    settings = [
        f"data.path={tmp_path / 'text.txt'}",
        "data.tokenizer=byte",
        "training.seq_len=16",
        f"data.cache_dir={tmp_path}",
    ]
    done = bench(
        "train", "--steps", "3", "--repeat", "1", "--peer", peer, "--work", str(tmp_path), *settings
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"error: {why}"


@pytest.mark.slow
def test_llm_c_is_not_set_beside_a_llama(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(500)))
    (tmp_path / "train_gpt2.c").write_text("")
    settings = [
        f"data.path={tmp_path / 'text.txt'}",
        "data.tokenizer=byte",
        "training.seq_len=16",
        f"data.cache_dir={tmp_path}",
    ]
    done = bench(
        "train",
        "--steps",
        "3",
        "--repeat",
        "1",
        "--peer",
        f"llmc={tmp_path}",
        "--work",
        str(tmp_path),
        *settings,
    )
    assert (done.returncode, done.stdout) == (2, "")
    why = "--peer llmc trains GPT-2 only; give it a config of that kind, such as presets/gpt2_124m.yaml"
    assert done.stderr.splitlines()[-1] == f"error: {why}"


@pytest.mark.slow
def test_training_is_set_beside_transformers_and_its_steps_are_taken_apart(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    tiny = [
        "model.n_layers=1",
        "model.d_model=16",
        "training.seq_len=16",
        "data.tokenizer=byte",
        f"data.cache_dir={tmp_path}",
    ]
    options = [
        "--steps",
        "30",
        "--peer-steps",
        "6",
        "--repeat",
        "1",
        "--parts",
        "--peer",
        "transformers",
        "--work",
        str(tmp_path),
    ]
    done = bench("train", *options, f"data.path={tmp_path / 'text.txt'}", *tiny)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        float(re.search(rf"^ {name}.*? {{2,}}([\d.]+) ", done.stdout, re.MULTILINE)[1])
        for name in ("this", "transformers")
    )
    ratio = float(re.search(r"([\d.]+)x transformers", done.stdout)[1])
    assert ratio == pytest.approx(
        theirs / ours, abs=0.01 + 0.005 * ratio
    )  # the table's figures are rounded
    parts = dict(
        re.findall(
            r"(data|forward|backward|clip|optimizer|logging|Lightning and the rest) (-?[\d.]+)",
            done.stdout,
        )
    )
    assert len(parts) == 7 and all(
        float(parts[name]) > 0 for name in ("forward", "backward", "clip", "optimizer")
    )
    assert re.search(r"first step [\d.]+ s after the start of the process", done.stdout)


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A checkpoint."""
    path = tmp_path / "small.ckpt"
    sizes = {
        "vocab_size": ByteTokenizer().vocab_size,
        "n_layers": 2,
        "d_model": 64,
        "n_heads": 4,
        "n_kv_heads": 2,
        "max_seq_len": 64,
    }
    config = config_from_dict(
        {"model": sizes, "data": {"tokenizer": "byte"}, "training": {"seq_len": 64}}
    )
    weights = {f"model.{name}": p for name, p in Transformer(config.model).state_dict().items()}
    kit = checkpoint_metadata(config, ByteTokenizer().state(), tokens=1, val_loss=None)
    save_checkpoint({"state_dict": weights, "global_step": 1, "kit": kit}, path)
    return str(path)


def test_the_servers_clients_are_counted(small):
    done = bench(
        "serve",
        "--ckpt",
        small,
        "--dtypes",
        "float32",
        "--clients",
        "3",
        "--tokens",
        "4",
        "--repeat",
        "2",
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"float32, (streaming|whole) +([\d,]+) +(\d+) (\d+) +([\d,]+) +(\d+) (\d+) +([\d.]+)",
        done.stdout,
    )
    assert [row[0] for row in rows] == ["streaming", "whole"]
    for _, *numbers in rows:
        one, first, second, many, third, fourth, ratio = (
            float(number.replace(",", "")) for number in numbers
        )
        assert one == pytest.approx((first + second) / 2, abs=1) and many == pytest.approx(
            (third + fourth) / 2, abs=1
        )
        assert ratio == pytest.approx(many / one, abs=0.0051 + ratio * (0.51 / one + 0.51 / many))
    done = bench("serve", "--ckpt", "README.md")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: serve.py did not start: README.md")


def test_generation_is_set_beside_transformers_on_the_same_weights(small):
    options = [
        "--beside",
        "float32",
        "--dtypes",
        "float32",
        "int8",
        "--torch",
        "--tokens",
        "8",
        "--batch",
        "3",
        "--repeat",
        "2",
    ]
    done = bench("generate", "--ckpt", small, *options)
    assert done.returncode == 0, done.stderr
    rows = [
        re.match(r" *(\S.*?) {2,}([\d.,]+) +([\d.]+)x +(\d+)% +([\d.]+) ([\d.]+) ", line)
        for line in done.stdout.splitlines()
    ]
    rates = {row[1]: float(row[2].replace(",", "")) for row in rows if row}
    ratios = {row[1]: float(row[3]) for row in rows if row}
    assert list(rates) == [
        "transformers, float32",
        "this, float32, in C",
        "this, int8, in C",
        "this, bfloat16, in torch",
    ]
    for name, ratio in ratios.items():
        ours, theirs = rates[name], rates["transformers, float32"]
        assert ratio == pytest.approx(
            ours / theirs, abs=0.0051 + ratio * (0.051 / ours + 0.051 / theirs)
        )  # to 2 digits, of 1 digit
