"""The paths of the server, its page, and its connections to slow clients."""

import base64
import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import openai
import pytest

from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.serving import app
from pocketlm.serving.limits import ServerLimits
from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.server import (
    CONTEXT,
    RunningServer,
    error_of,
    serving_in_thread,
    until,
    write_checkpoint,
)


def test_the_model_describes_itself(server: RunningServer) -> None:
    client, checkpoint = server.client, server.checkpoint
    (model,) = client.models.list().data
    assert model == client.models.retrieve("small")
    n_parameters = sum(p.numel() for p in checkpoint.model.parameters())
    expected = {
        "path": "small.ckpt",
        "step": 3,
        "tokens": 9,
        "val_loss": 2.5,
        "parameters": n_parameters,
        "context": CONTEXT,
        "sha256": checkpoint.weights_sha256,
    }
    assert {name: model.checkpoint[name] for name in expected} == expected
    assert model.checkpoint["dtype"].startswith("float32 on cpu")
    assert model.chat == "template"
    assert (model.sampling["top_k"], model.sampling["temperature"]) == (40, 0.9)
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"


def test_health(server: RunningServer) -> None:
    assert server.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "path", ["/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/models/small"]
)
def test_head_has_the_headers_of_get_and_no_body(server: RunningServer, path: str) -> None:
    head, get = server.http.head(path), server.get(path)
    assert (head.status_code, head.content) == (200, b"")
    names = ("content-type", "content-security-policy")
    assert [head.headers.get(name) for name in names] == [get.headers.get(name) for name in names]
    error = server.http.head("/v1/completions")
    assert (error.status_code, error.content) == (405, b"")


def test_a_model_answers_to_each_of_its_names(server: RunningServer) -> None:
    names = ("gpt-4o", "org/my model")
    with serving_in_thread(server.checkpoint, ServerLimits(), names) as other:
        assert [model.id for model in other.client.models.list().data] == list(names)
        for name in names:
            assert other.client.models.retrieve(name).id == name
            done = other.client.completions.create(model=name, prompt="hello", max_tokens=1)
            assert done.model == "gpt-4o"
        for unknown in ("small", "gpt-4"):
            with pytest.raises(openai.NotFoundError, match="has 'gpt-4o', 'org/my model'"):
                other.client.completions.create(model=unknown, prompt="hello")


@pytest.mark.parametrize("path", ["/v2", "/docs", "/v1/completions/"])
def test_an_unknown_path_is_an_error_in_openais_format(server: RunningServer, path: str) -> None:
    error_of(server.get(path), 404)
    error_of(server.post(path, json={"model": "small", "prompt": "hello"}), 404)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_another_method_is_an_error_in_openais_format(server: RunningServer, method: str) -> None:
    error_of(server.http.request(method, "/v1/completions"), 405)


def test_the_start_up_message_has_a_command_that_works(server: RunningServer) -> None:
    command = server.startup_message.splitlines()[2]
    assert command.startswith("curl ")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["object"] == "text_completion"


def test_the_page_may_run_its_own_scripts_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hashes are those that a browser computes: of the characters between the tags."""
    page = tmp_path / "index.html"
    monkeypatch.setattr(app, "PAGE", page)
    assert app.read_page() == (None, "")
    script = "\nlet a = 'ä';\n"
    page.write_text(f"<style>b{{}}</style><script>{script}</script>", encoding="utf-8")
    _, policy = app.read_page()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy


NOT_HTTP = {
    "text": b"hello\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "long header": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
}


@pytest.mark.parametrize("data", NOT_HTTP.values(), ids=NOT_HTTP)
def test_what_is_not_http_gets_an_error_too(server: RunningServer, data: bytes) -> None:
    response = server.send_raw(data)
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":' in response


# ---- slow clients ----


@pytest.fixture
def impatient_server(tmp_path: Path) -> Iterator[RunningServer]:
    """A server in this process that waits for a client for a fraction of a second only."""
    path = write_checkpoint(tmp_path / "small.ckpt", ByteTokenizer(), context=4096)
    limits = ServerLimits(
        max_slots=2,
        max_queue=2,
        deadline_seconds=60,
        head_seconds=0.3,
        body_seconds=0.3,
        write_seconds=0.3,
    )
    with serving_in_thread(load_checkpoint(path), limits) as server:
        yield server


def test_a_client_that_is_slow_to_send_a_request_is_disconnected(
    impatient_server: RunningServer,
) -> None:
    """One client sends a byte at a time and never a whole head; another sends nothing."""
    with impatient_server.connect() as silent:
        with impatient_server.connect() as slow, pytest.raises(ConnectionError):
            for byte in b"GET /health HTTP/1.1\r\nHost: " + b"a" * 600:
                slow.sendall(bytes([byte]))
                time.sleep(0.05)
        with suppress(ConnectionResetError):
            assert silent.recv(1) == b""


def test_a_body_that_does_not_come_is_an_error(impatient_server: RunningServer) -> None:
    head = [
        b"POST /v1/completions HTTP/1.1",
        b"Host: a",
        b"Content-Type: application/json",
        b"Content-Length: 100",
    ]
    response = impatient_server.send_raw(b"\r\n".join([*head, b"", b"{"]))
    assert response.startswith(b"HTTP/1.1 408 ")


def test_a_client_that_does_not_read_is_disconnected(impatient_server: RunningServer) -> None:
    megabytes = {"stream": True, "n": 2, "logprobs": 20}
    with impatient_server.start_long_completion(**megabytes):
        until(lambda: impatient_server.metrics()["serve_cancelled_total"] == 1)
        until(lambda: impatient_server.metrics()["serve_running_rows"] == 0)
