"""The commands in the README and in docs/ run, word for word, in a copy of the project.

A document's commands are the lines of its ```bash blocks. Commands that train get sizes that take
seconds; commands that need a network, a package manager or minutes belong in ```text blocks.
"""

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

from tests.support.forked_commands import ForkedCommands

ROOT = Path(__file__).parents[2]
SMALL = [
    "training.max_steps=3",
    "training.warmup_steps=1",
    "model.n_layers=1",
    "model.d_model=24",
    "training.seq_len=48",
    "training.micro_batch_size=2",
]
NOT_RUN = ("pip ", "python -m pytest", "python -m pdoc")  # the last has a test of its own
DOCUMENTS = [
    "docs/train.md",
    "docs/data.md",
    "docs/generate.md",
    "docs/serve.md",
    "docs/evaluate.md",
    "docs/reproduce.md",
    "docs/microgpt_walkthrough.md",
    "examples/README.md",
]


COMMANDS = ("train", "data", "infer", "evaluate_checkpoints", "serve", "quantize", "harness")


def commands_of(document: str) -> list[str]:
    """The lines of a document's bash blocks, split at &&, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part and not part.startswith("#")]


def environment() -> dict[str, str]:
    """The environment with this Python first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path}


def copy_project(folder: Path) -> None:
    """Copy the project; share its cache of data, and add a text of the user's own."""
    for name in ROOT.glob("*.py"):
        shutil.copy(name, folder)
    shutil.copy(ROOT / "config.yaml", folder)
    for name in ("pocketlm", "benchmarks", "presets", "cases", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    (ROOT / "data").mkdir(exist_ok=True)
    (folder / "data").symlink_to(ROOT / "data")
    (folder / "book.txt").write_text("".join(f"{i} and {i} are {2 * i}.\n" for i in range(500)))


def shortened(words: list[str]) -> list[str]:
    """The command with sizes that take seconds."""
    if words[1] == "train.py" and "--print-config" not in words:
        return [*words, *SMALL]
    if words[1] == "infer.py" and "--max-new-tokens" not in words:
        return [*words, "--max-new-tokens", "5"]
    return words


def run_python(command: str, folder: Path, commands: ForkedCommands) -> None:
    """Run a command of the project, which has to succeed and print a result."""
    words = shlex.split(command)
    assert words[0] == "python", f"no way to run {command!r} is known"
    _, program, *arguments = shortened(words)
    with contextlib.chdir(folder):
        done = commands.run(*arguments, program=program)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert done.stdout.strip()


def run_server(command: str, curl: str, folder: Path) -> None:
    """Start a server at a free port, and run the curl command that follows it."""
    words = [sys.executable, *shlex.split(command)[1:], "--port", "0"]
    with subprocess.Popen(
        words, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            lines = [server.stderr.readline() for _ in range(2)]
            address = re.match(r"http://127.0.0.1:\d+", lines[-1])[0]
            request = shlex.split(curl.replace("http://127.0.0.1:8000", address))
            done = subprocess.run(request, capture_output=True, text=True)
        finally:
            server.terminate()
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 40, done.stdout + done.stderr


def run_tensorboard(command: str, folder: Path) -> None:
    """Start TensorBoard at a free port, and wait for the validation loss of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}/data/plugin/scalars/tags"
    words = [*shlex.split(command), "--port", str(port)]
    tags = ""
    with subprocess.Popen(
        words, cwd=folder, env=environment(), stderr=subprocess.DEVNULL
    ) as server:
        try:
            for _ in range(120):
                with contextlib.suppress(OSError):
                    tags = urllib.request.urlopen(url, timeout=2).read().decode()
                if "loss/bits_per_byte" in tags:
                    break
                time.sleep(0.5)
        finally:
            server.terminate()
    assert "loss/bits_per_byte" in tags


def run_documented(
    document: str, folder: Path, ran: set[str], forked_commands: ForkedCommands
) -> None:
    """Run a document's commands in order, except those in `ran`, and add them to it."""
    commands = commands_of(document)
    for i, command in enumerate(commands):
        if command in ran or command.startswith((*NOT_RUN, "curl ")):
            continue
        if command.startswith("tensorboard "):
            run_tensorboard(command, folder)
        elif command.startswith("python serve.py"):
            run_server(command, commands[i + 1], folder)
        else:
            run_python(command, folder, forked_commands)
        ran.add(command)


def test_the_four_commands_are_in_the_readme_word_for_word():
    text = (ROOT / "README.md").read_text()
    for command in (
        "pip install -r requirements.txt && python train.py --config config.yaml",
        'python infer.py --prompt "The history of Dubai is"',
        "python evaluate_checkpoints.py --cases cases/wiki_basics.yaml",
        "python infer.py --ckpt checkpoints/final.ckpt --tokenizer gpt2 "
        '--prompt "The history of Dubai is"',
    ):
        assert f"\n{command}\n" in text


@pytest.mark.slow
def test_the_documented_commands_run_in_order(tmp_path, forked_commands):
    """In one copy of the project: the README's, and then each document's that are new."""
    copy_project(tmp_path)
    ran: set[str] = set()
    for document in ("README.md", *DOCUMENTS):
        run_documented(document, tmp_path, ran, forked_commands)
    commands = {command.split()[1] for command in ran if command.startswith("python ")}
    assert commands >= {f"{name}.py" for name in COMMANDS}


def test_every_document_with_commands_is_run():
    documents = [*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
    with_commands = {
        str(path.relative_to(ROOT)) for path in documents if "```bash" in path.read_text()
    }
    assert with_commands == set(DOCUMENTS)
