"""The command `serve.py`: its options, and errors at start-up."""

import errno
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import serve
from pocketlm.errors import UserError

ROOT = Path(__file__).parents[2]
MICROGPT = str(ROOT / "examples" / "microgpt.ckpt")


def start_error(*options: str) -> str:
    """Run serve.py; assert that it fails with one line on stderr and status 2, and return it."""
    command = [sys.executable, str(ROOT / "serve.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_port_in_use_is_one_line_and_status_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = start_error("--ckpt", MICROGPT, "--port", str(port))
    assert f"cannot listen on 127.0.0.1, port {port}: " in message


def test_a_broken_checkpoint_is_one_line_and_status_2(tmp_path: Path) -> None:
    path = tmp_path / "no.ckpt"
    path.write_text("nothing")
    message = start_error("--ckpt", str(path), "--port", "0")
    assert "is truncated or not a checkpoint" in message


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--host", "0.0.0.0"],
            "accepts connections from other machines; set SERVE_API_KEY to an API key",
        ),
        (["--host", "example.org"], "accepts connections from other machines"),
        (["--port", "70000"], "--port is 70000; use a port from 0 to 65535"),
        (["--rows", "0"], "--rows is 0; use a value from 1 to 1,024"),
        (["--deadline", "nan"], "--deadline is nan"),
        (["--api-key", ""], "the API key is empty"),
        (["--api-key", "schlüssel"], "not plain ASCII"),
        (["--model-name", "a", " "], "--model-name ' ' is no name"),
        (["--model-name", "a" * 201], "use 1 to 200 characters"),
        (["--allow-host", "http://a"], "--allow-host 'http://a' is not HOST or HOST:PORT"),
        (["--allow-host", "a:b"], "--allow-host 'a:b' is not HOST or HOST:PORT"),
        (
            ["--host", "0.0.0.0", "--api-key", "x", "--allow-host", "a"],
            "--host 0.0.0.0 accepts every Host header already; leave --allow-host out",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_options_are_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    with pytest.raises(UserError, match=re.escape(message)):
        serve.parse_args(options)


def test_names_and_hosts_may_be_several() -> None:
    options = ["--model-name", "gpt-4", "a/b", "--allow-host", "localhost:9000"]
    args = serve.parse_args([*options, "--model-name", "c", "--allow-host", "[::1]:9000", "a.b"])
    assert args.model_name == ["gpt-4", "a/b", "c"]
    assert args.allow_host == ["localhost:9000", "[::1]:9000", "a.b"]


def test_other_machines_need_a_key() -> None:
    assert serve.parse_args(["--host", "0.0.0.0", "--api-key", "x"]).api_key == "x"


def test_a_cache_that_does_not_fit_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("pocketlm.inference.backend.mmap", out_of_memory)
    options = ["--ckpt", MICROGPT, "--port", "0", "--device", "cpu", "--rows", "7"]
    expected = "not enough memory for 7 slots of 16 tokens: .*; lower --rows"
    with pytest.raises(UserError, match=expected):
        serve.main(options)
