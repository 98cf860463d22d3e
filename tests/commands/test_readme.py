"""What the README and the shipped files say is so."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml

from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.loading import load_config
from pocketlm.config.sections import Config
from pocketlm.data.datasets import PaddedLMDataset
from pocketlm.data.shards import TokenShard
from pocketlm.model.loss import IGNORE_INDEX, cross_entropy

ROOT = Path(__file__).parents[2]
SMALL = [
    "training.max_steps=3",
    "training.warmup_steps=1",
    "model.n_layers=1",
    "model.d_model=24",
    "training.seq_len=32",
    "training.micro_batch_size=2",
]
NOT_RUN = (
    "pip ",
    "git ",
    "source ",
    "python3 -m venv",
    "python -m pytest",
)  # what stands between a reader and the commands below


def readme_commands() -> list[str]:
    """The lines of the README's bash blocks, split at &&, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [
        part.strip()
        for line in lines
        for part in line.split("&&")
        if part.strip() and not part.strip().startswith("#")
    ]


@pytest.mark.slow
def test_the_readmes_commands_run_in_order(tmp_path):
    """Word for word, in a copy of the project; train.py gets a small override, and tensorboard is asked for its runs."""
    for name in ROOT.glob("*.py"):
        shutil.copy(name, tmp_path)
    for name in ("config.yaml", "pocketlm", "benchmarks", "presets", "cases", "examples"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (ROOT / "data").mkdir(exist_ok=True)
    (tmp_path / "data").symlink_to(ROOT / "data")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    ran = []
    for at, command in enumerate(commands := readme_commands()):
        words = shlex.split(command)
        if command.startswith(NOT_RUN):
            continue
        if words[1:3] == ["-m", "pdoc"]:
            continue  # a test of its own, below
        if words[0] == "tensorboard":
            check_tensorboard(words, tmp_path, environment)
            continue
        if words[1] == "serve.py":
            check_server(words, commands[at + 1], tmp_path, environment)
        if words[0] == "curl" or words[1] == "serve.py":
            continue
        assert words[0] == "python", f"no way to run {command!r} is known"
        if words[1] == "train.py" and "--print-config" not in words:
            words += SMALL
        if words[1] == "infer.py" and "--max-new-tokens" not in words:
            words += ["--max-new-tokens", "5"]
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip()
        ran.append(words[1])
    assert {"train.py", "infer.py", "evaluate_checkpoints.py"} <= set(ran)


def check_server(words: list[str], ask: str, folder: Path, environment: dict[str, str]) -> None:
    """And the curl command behind it, at a port that is free."""
    with subprocess.Popen(
        [sys.executable, *words[1:], "--port", "0"],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            said = [server.stderr.readline() for _ in range(2)]
            place = re.match(r"http://127.0.0.1:\d+", said[-1])[0]
            done = subprocess.run(
                shlex.split(ask.replace("http://127.0.0.1:8000", place)),
                capture_output=True,
                text=True,
            )
        finally:
            server.terminate()
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 40, done.stdout + done.stderr


def check_tensorboard(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    tags = ""
    with subprocess.Popen(
        [*words, "--port", str(port)], cwd=folder, env=environment, stderr=subprocess.DEVNULL
    ) as server:
        try:
            for _ in range(120):
                with contextlib.suppress(OSError):
                    tags = (
                        urllib.request.urlopen(
                            f"http://localhost:{port}/data/plugin/scalars/tags", timeout=2
                        )
                        .read()
                        .decode()
                    )
                if "val/bpb" in tags:
                    break
                time.sleep(0.5)
        finally:
            server.terminate()
    assert "val/bpb" in tags


def test_ci_runs_the_readmes_own_test_command():
    """It reads the block under the heading Test; here, that the block is there and is the two-part command."""
    script, text = (ROOT / ".ci/run").read_text(), (ROOT / "README.md").read_text()
    assert "/^## Test/,$p" in script
    assert "pip install -r requirements-dev.txt && python -m pytest" in text.split("## Test")[1]


def test_the_readmes_tree_names_every_command_and_package():
    tree = re.search(r"```text\n(model\.py.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    files = {path.name for path in [*ROOT.glob("*.py"), *(ROOT / "pocketlm").glob("*.py")]} - {
        "__init__.py"
    }
    folders = {f"{path.parent.name}/" for path in (ROOT / "pocketlm").rglob("__init__.py")}
    assert files | folders <= set(tree.split())


def test_the_readmes_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_what_the_walk_through_names_is_where_it_says():
    text = (ROOT / "docs/microgpt_walkthrough.md").read_text()
    named = re.findall(r"`([^`]+)` \[([\w/]+\.py)\]\(\.\./([\w/]+\.py)\)", text)
    assert len(named) > 15
    for symbol, file, same_file in named:
        assert file == same_file
        assert re.search(rf"\b{symbol}\b", (ROOT / file).read_text()), (
            f"{symbol} does not stand in {file}"
        )


@pytest.mark.slow
def test_the_reference_command_documents_every_module_without_a_warning(tmp_path):
    [command] = re.findall(r"python (-m pdoc .+)", (ROOT / "README.md").read_text())
    words = shlex.split(command.split("  #")[0])
    folder = tmp_path / "api"
    words[words.index("-o") + 1] = str(folder)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    documented = {
        str(page.relative_to(folder).with_suffix(".py")) for page in folder.rglob("*.html")
    }
    modules = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "pocketlm").rglob("*.py")
        if file.name != "__init__.py"
    }
    assert modules | {"model.py", "train.py", "data.py"} <= documented
    assert "Token ids (B, T) -&gt; logits (B, T, V)" in (folder / "model.html").read_text()


def test_the_example_checkpoint_and_shard_belong_together_and_are_as_good_as_stated():
    """Loaded as a user would, and the loss stated in examples/README.md measured again from the shard."""
    example = load_checkpoint(ROOT / "examples/microgpt.ckpt")
    shard = TokenShard(ROOT / "examples/names_val.bin")
    assert shard.header.tokenizer == example.tokenizer.fingerprint
    rows = PaddedLMDataset(shard, example.config.training.seq_len, ends_shared=True)
    batch = rows.__getitems__(list(range(len(rows))))
    with torch.no_grad():
        loss = float(
            cross_entropy(example.model(batch["input_ids"]), batch["targets"])
            / (batch["targets"] != IGNORE_INDEX).sum()
        )
    assert (
        TokenShard(ROOT / "examples/names_train.bin").header.sha256
        == read_checkpoint(example.path)["kit"]["data_sha256"]
    )
    stated = re.findall(
        r"([\d,]+) names.* ([\d.]+) nats", (ROOT / "examples/README.md").read_text()
    )
    assert [(int(count.replace(",", "")), float(nats)) for count, nats in stated] == [
        (shard.header.documents, pytest.approx(loss, abs=5e-4))
    ]
    assert (
        example.model.config.n_parameters == 4192
        and (ROOT / "examples/microgpt.ckpt").stat().st_size < 100_000
    )


def test_config_yaml_states_every_key_and_its_default():
    path = ROOT / "config.yaml"
    assert load_config(path) == Config()
    stated = yaml.safe_load(path.read_text())
    assert {s: set(keys) for s, keys in stated.items()} == {
        s: set(keys) for s, keys in Config().to_dict().items()
    }
    assert all("#" in line for line in path.read_text().splitlines() if re.match(r"  \w+:", line))


@pytest.mark.parametrize("path", sorted(ROOT.glob("presets/*.yaml")), ids=lambda p: p.name)
def test_each_preset_loads_and_holds_only_differences(path):
    config = load_config(path)
    assert config.run.name == path.stem
    given, default = yaml.safe_load(path.read_text()), Config().to_dict()
    same = [
        f"{s}.{k}"
        for s, keys in given.items()
        for k in keys
        if config.to_dict()[s][k] == default[s][k]
    ]
    assert not same


def test_every_requirement_is_pinned():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            requirement = line.split("#")[0].strip()
            assert (
                not requirement
                or requirement in ("pip", "-r requirements.txt")
                or "==" in requirement
            ), line
