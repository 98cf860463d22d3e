"""The benchmarks run, and what they compare does the same work."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from benchmarks import data as bench_data
from benchmarks import measure, peers
from benchmarks import serve as bench_serve
from benchmarks import train as bench_train
from benchmarks.configs import load_absolute
from benchmarks.measure import Finished, parse_peers
from model import Transformer
from pocketlm.checkpoint.format import checkpoint_metadata, save_checkpoint
from pocketlm.config.loading import config_from_dict
from pocketlm.errors import UserError
from pocketlm.instruction_sets import LIBRARY_VARIABLES, VARIABLE, available_sets, instruction_set
from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.forked_commands import ForkedCommands

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "config.yaml")
TINY = ["model.n_layers=1", "model.d_model=16", "training.seq_len=16", "data.tokenizer=byte"]
Bench = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Bench:
    """Run bench.py in an empty directory; return what it prints.

    It runs in this process, which has torch already. Contenders are processes of their own.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        assert bench.main(list(arguments)) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch, forked_commands: ForkedCommands) -> None:
    """Contenders that need torch are forks of a process that has it, which saves seconds each."""
    in_a_new_process = measure.run_watched

    def run_watched(command: list[str], folder: Path, *others: Any, **named: Any) -> Finished:
        _, program, *arguments = command
        if program == "-c":
            if "import datasets" in arguments[0]:
                return in_a_new_process(command, folder, *others, **named)
            Path(folder, "code.py").write_text(arguments.pop())
            program = str(Path(folder, "code.py").resolve())
        with contextlib.chdir(folder):
            done = forked_commands.run(*arguments, program=program)
        assert done.returncode == 0, done.stderr
        return Finished(1.0, 1.0, done.stdout)

    for module in (measure, bench_train, peers):
        monkeypatch.setattr(module, "run_watched", run_watched)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def write_text(path: Path) -> None:
    """Write sums, 30 KB and more."""
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))


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


def test_the_preparations_that_are_compared_make_the_same_tokens(
    run, tmp_path, monkeypatch, forked
):
    """Ours has an eos before the first document of each part; both have one after each document."""
    monkeypatch.setattr(bench_data, "READ_SECONDS", 0.1)
    (tmp_path / "work").mkdir()
    printed = run("prepare", "--mb", "1", "--repeat", "1", "--work", "work")
    rows = dict(re.findall(r"^ (\S.*?) {2,}(.*)$", printed, re.MULTILINE))
    header = re.search(r"whole process.*", printed)[0]
    position = re.split(r"  +", header.strip()).index("tokens")
    cells = {name: re.split(r"  +", row.strip()) for name, row in rows.items()}
    ours, theirs = (
        number(cells[name][position]) for name in ("this, gpt2", "datasets.map + tiktoken")
    )
    assert ours == theirs + 2 > 200_000
    assert len(re.findall(r"reading (?:shards|a stream): [\d.]+ M tokens/s", printed)) == 2
    assert list(Path("work").iterdir()) == []


def test_the_loader_is_compared_with_the_training_it_feeds(run, tmp_path, monkeypatch, forked):
    """Training, which another test runs, is here one that takes 0.5, 2 and 4 s a step."""
    monkeypatch.setattr(bench_data, "READ_SECONDS", 0.1)
    monkeypatch.setattr(bench_data, "our_run", lambda *_: ([2.0, 0.5, 4.0], 1.0))
    write_text(tmp_path / "text.txt")
    rows = ["training.micro_batch_size=4", "training.grad_accum_steps=2"]
    printed = run("loader", "--config", CONFIG, "data.path=text.txt", *TINY, *rows)
    found = re.search(
        r"training takes (\d+) tokens/s\n"
        r"  the loader alone, 0 workers: ([\d,]+) tokens/s, (\d+) times\n",
        printed,
    )
    demand, rate, times = map(number, found.groups())
    assert demand == 4 * 2 * 16 / 2.0
    assert times == pytest.approx(rate / demand, abs=0.51)  # both rates are rounded


@pytest.mark.parametrize(
    "command, peer, message",
    [
        pytest.param(
            "prepare",
            "gptnano={}",
            "--peer gptnano={}: the peer here is nanogpt=PATH, a checkout of it",
            id="not nanoGPT's preparation",
        ),
        pytest.param(
            "train",
            "gptnano={}",
            "--peer gptnano: the peers are nanogpt=PATH, llmc=PATH, litgpt=PATH, transformers",
            id="not known",
        ),
        pytest.param(
            "train",
            "nanogpt={}",
            "--peer nanogpt={}: there is no train.py in it; give a checkout of nanogpt",
            id="no checkout",
        ),
        pytest.param(
            "train",
            "llmc={}",
            "--peer llmc trains GPT-2 only; give it a config of that kind, "
            "such as presets/gpt2_124m.yaml",
            id="llm.c on a Llama",
        ),
    ],
)
def test_a_peer_that_cannot_run_is_refused_before_anything_runs(
    run, tmp_path, command, peer, message
):
    (tmp_path / "train_gpt2.c").write_text("")
    options = ["--config", CONFIG] if command == "train" else []
    with pytest.raises(UserError) as refusal:
        run(command, "--peer", peer.format("."), *options)
    assert str(refusal.value) == message.format(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["train_gpt2.c"]


def test_training_is_compared_with_transformers_and_its_steps_are_timed_in_parts(
    run, tmp_path, forked
):
    """All paths are relative to where the command was typed, which is not where runs work."""
    write_text(tmp_path / "text.txt")
    (tmp_path / "val.txt").write_text("7 times 7 is 49.\n" * 30)
    (tmp_path / "tiny.yaml").write_text("data: {path: text.txt, cache_dir: cache}")
    (tmp_path / "work").mkdir()
    options = ["--config", "tiny.yaml", "--steps", "30", "--peer-steps", "6", "--repeat", "1"]
    options += ["--parts", "--peer", "transformers", "--work", "work"]
    printed = run("train", *options, "data.val_path=val.txt", *TINY)
    assert f", {instruction_set().name}, {torch.get_num_threads()} threads, " in printed
    ours, theirs = (
        float(re.search(rf"^ {name}.*? {{2,}}([\d.]+) ", printed, re.MULTILINE)[1])
        for name in ("this", "transformers")
    )
    ratio = float(re.search(r"([\d.]+)x transformers", printed)[1])
    # The table's figures are rounded.
    assert ratio == pytest.approx(theirs / ours, abs=0.01 + 0.005 * ratio)
    named = r"(data|forward|backward|clip|optimizer|logging|Lightning and the rest) (-?[\d.]+)"
    parts = {name: float(ms) for name, ms in re.findall(named, printed)}
    assert len(parts) == 7
    assert all(parts[name] > 0 for name in ("forward", "backward", "clip", "optimizer"))
    assert re.search(r"first step [\d.]+ s after the start of the process", printed)
    assert {file.name for file in tmp_path.iterdir()} == {
        *("text.txt", "val.txt", "tiny.yaml", "work", "cache")
    }


def test_paths_of_a_config_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("tokenizer.json").write_text("{}")
    Path("byte").write_text("a file that is called as a tokenizer")
    config = Path("mixed.yaml")
    config.write_text(
        "data:\n  tokenizer: tokenizer.json\n  cache_dir: ../cache\n"
        "  mixture: [{path: 'a/*.txt', val_path: ~/b.txt}, {optional_path: c}, {source: names}]"
    )
    data = load_absolute("mixed.yaml", []).data
    first, second, third = data.mixture
    assert (first.path, first.val_path) == (f"{tmp_path}/a/*.txt", f"{tmp_path}/home/b.txt")
    assert (second.path, second.optional_path) == (None, f"{tmp_path}/c")
    assert (third.path, third.optional_path, third.source) == (None, None, "names")
    assert data.tokenizer == f"{tmp_path}/tokenizer.json"
    assert data.cache_dir == str(tmp_path.parent / "cache")
    config.write_text("data: {path: /text.txt, tokenizer: byte}")
    assert load_absolute("mixed.yaml", []).data.tokenizer == "byte"
    assert load_absolute("mixed.yaml", ["data.tokenizer=owner/name"]).data.path == "/text.txt"


def test_two_paths_to_one_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data.val_path 'a' is the path to train on"):
        load_absolute(CONFIG, ["data.path=a", "data.val_path=./a"])


def test_the_path_of_a_peer_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_peers(["nanogpt=../nanoGPT", "llmc=~/llm.c", "transformers"]) == {
        "nanogpt": str(tmp_path.parent / "nanoGPT"),
        "llmc": "/home/me/llm.c",
        "transformers": "",
    }


def test_a_work_folder_that_is_none_is_refused(run):
    with pytest.raises(UserError, match=r"^--work nowhere is not a folder; create it"):
        run("prepare", "--work", "nowhere")


def test_all_contenders_keep_to_an_instruction_set(run, small, forked_commands):
    """The benchmark is a process of its own for each set, and so is infer.py."""
    isa = available_sets()[0].name
    options = ["--works", "start", "--dtypes", "int8", "--repeat", "1", "--isa", isa]
    done = forked_commands.run("generate", "--ckpt", small, *options, program="bench.py")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        rf".* parameters; .*, \d+ cores, {isa}\n"
        r"  infer.py's first token, int8: ([\d.]+) s after the start of the process \(\1\)\n",
        done.stdout,
    )


def test_an_instruction_set_that_the_cpu_lacks_is_refused(run, monkeypatch):
    for variable in (VARIABLE, *LIBRARY_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    names = ", ".join(isa.name for isa in available_sets())
    with pytest.raises(UserError) as refusal:
        run("generate", "--ckpt", "absent", "--isa", available_sets()[0].name, "--isa", "avx3")
    assert str(refusal.value) == f"--isa avx3: this CPU has {names}; name one of these"


def test_the_servers_clients_are_counted(run, small):
    options = ["--dtypes", "float32", "--clients", "3", "--tokens", "4", "--repeat", "2"]
    printed = run("serve", "--ckpt", small, *options)
    rows = re.findall(
        r"float32, (streaming|whole) +([\d,]+) +(\d+) (\d+) +([\d,]+) +(\d+) (\d+) +([\d.]+)",
        printed,
    )
    assert [row[0] for row in rows] == ["streaming", "whole"]
    for _, *cells in rows:
        one, first, second, many, third, fourth, ratio = map(number, cells)
        assert one == pytest.approx((first + second) / 2, abs=1)
        assert many == pytest.approx((third + fourth) / 2, abs=1)
        assert ratio == pytest.approx(many / one, abs=0.0051 + ratio * (0.51 / one + 0.51 / many))


def test_a_server_that_does_not_start_is_reported(run, tmp_path, monkeypatch):
    (tmp_path / "serve.py").write_text("raise SystemExit('error: README.md is no checkpoint')")
    monkeypatch.setattr(bench_serve, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"^serve.py did not start: README.md is no checkpoint$"):
        run("serve", "--ckpt", "README.md")


def test_generation_is_compared_with_transformers_on_the_same_weights(run, small):
    options = ["--beside", "float32", "--dtypes", "float32", "int8", "--torch"]
    options += ["--works", "alone", "batch", "first"]
    printed = run(
        "generate", "--ckpt", small, *options, "--tokens", "8", "--batch", "3", "--repeat", "2"
    )
    rows = [
        re.match(r" *(\S.*?) {2,}([\d.,]+) +([\d.]+)x +(\d+)% +([\d.]+) ([\d.]+) ", line)
        for line in printed.splitlines()
    ]
    rates = {row[1]: number(row[2]) for row in rows if row}
    ratios = {row[1]: float(row[3]) for row in rows if row}
    names = list(rates)
    assert names[:3] == ["transformers, float32", "this, float32, in C", "this, int8, in C"]
    assert re.fullmatch("this, b?float(16|32), in torch", names[3]) and len(names) == 4
    theirs = rates["transformers, float32"]
    for name, ratio in ratios.items():
        # Ratios have two digits after the point, rates one.
        rounding = 0.0051 + ratio * (0.051 / rates[name] + 0.051 / theirs)
        assert ratio == pytest.approx(rates[name] / theirs, abs=rounding)


def test_probe_scores_are_compared_with_a_loop(run, small):
    cases = str(ROOT / "cases" / "grammar.yaml")
    printed = run("probes", "--ckpt", small, "--cases", cases, "--limit", "3", "--repeat", "1")
    difference = re.search(r"largest difference of a log-probability: (\S+) nats", printed)[1]
    assert float(difference) < 1e-3  # sums of a hundred float32 log-probabilities
