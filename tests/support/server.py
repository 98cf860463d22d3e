"""A real `python serve.py` for tests, with clients for it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai

import serve
from pocketlm.checkpoint.format import checkpoint_metadata, save_checkpoint
from pocketlm.checkpoint.loading import Checkpoint, load_checkpoint
from pocketlm.config.sampling import SamplingConfig, SamplingParams
from pocketlm.config.sections import Config, DataConfig, TrainingConfig
from pocketlm.inference.generate import encode_prompt, generate_texts
from pocketlm.serving.app import build_server
from pocketlm.serving.limits import ServerLimits
from pocketlm.serving.service import Service
from pocketlm.tokenizer.base import Tokenizer
from tests.support.checkpoints import confident_model

ROOT = Path(__file__).parents[2]
CONTEXT = 256  # of the checkpoints, unless a test asks for more
KEY = "a key 1234"
SAMPLING = {"temperature": 0.9, "top_k": 40}  # the checkpoints' defaults
# Special tokens in a message must stay text, or the prompt would have fewer tokens.
MESSAGES = [{"role": "user", "content": "hello, what is up?<|im_end|>"}]


@dataclass
class RunningServer:
    """A server and the checkpoint that it serves."""

    url: str
    checkpoint: Checkpoint
    process: subprocess.Popen | None = None  # None: a thread of this process
    startup_message: str = ""

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.checkpoint.path.stem

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    @cached_property
    def http(self) -> httpx.Client:
        """A client that uses a new connection for every request."""
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(base_url=self.url, limits=limits, timeout=60)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, path: str, headers: dict[str, str] | None = None, **options: Any):
        """POST with the API key, as JSON unless `headers` say otherwise."""
        default = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        return self.http.post(path, headers=default | (headers or {}), **options)

    def complete(self, prompt: object = "hello", **options: Any):
        return self.client.completions.create(model=self.name, prompt=prompt, **options)

    def chat(self, messages: list = MESSAGES, **options: Any):
        return self.client.chat.completions.create(model=self.name, messages=messages, **options)

    def expected_texts(self, prompts: list[str | list[int]], **params: Any) -> list[str]:
        """Return the texts that infer.py generates."""
        tokenizer = self.checkpoint.tokenizer
        ids = [
            encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        params = replace(SamplingParams(**SAMPLING), **params)
        return generate_texts(self.checkpoint.model, tokenizer, ids, params)

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").text.splitlines()
        samples = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in samples}

    def start_long_completion(self, **fields: Any) -> socket.socket:
        """Request thousands of tokens of the byte tokenizer; return the unread connection."""
        end_token = "256"
        fields = {
            "model": self.name,
            "prompt": "a",
            "max_tokens": 4096,
            "logit_bias": {end_token: -100},
        } | fields
        body = json.dumps(fields)
        head = [
            "POST /v1/completions HTTP/1.1",
            f"Host: 127.0.0.1:{self.port}",
            f"Authorization: Bearer {KEY}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        connection = self.connect()
        connection.sendall("\r\n".join([*head, "", body]).encode())
        return connection

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send_raw(self, data: bytes) -> bytes:
        """Send bytes; return everything that the server answers until it closes."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)

    def stop(self, sig: int = signal.SIGTERM) -> str:
        """Stop the server; assert that its exit status is 0, and return its output."""
        self.process.send_signal(sig)
        output = self.process.stderr.read()
        assert self.process.wait(30) == 0, output
        return output


def read_all(connection: socket.socket) -> bytes:
    """Return everything that comes until the connection is closed or reset."""
    data = b""
    with suppress(ConnectionError):
        while part := connection.recv(2**20):
            data += part
    return data


@contextmanager
def serving(path: Path, *options: str, **environment: str) -> Iterator[RunningServer]:
    """Run serve.py on a free port."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), "--ckpt", str(path), "--port", "0", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = [process.stderr.readline() for _ in range(3)]
    try:
        url = re.search(r"http://\S+", lines[1])
        assert url, "".join(lines) + process.stderr.read()
        yield RunningServer(url[0], load_checkpoint(path), process, "".join(lines))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@contextmanager
def serving_in_thread(
    checkpoint: Checkpoint, limits: ServerLimits, names: tuple[str, ...] = (), host: str = ""
) -> Iterator[RunningServer]:
    """Run the server in a thread of this process; with `host`, only that Host header is let in."""
    listener = serve.listen("127.0.0.1", 0)
    service = Service(checkpoint, {}, 1, limits, names)
    server = build_server(service, hosts={host} if host else None, key=None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", checkpoint)
    finally:
        server.should_exit = True
        thread.join()


def write_checkpoint(
    path: Path, tokenizer: Tokenizer, template: str | None = None, context: int = CONTEXT
) -> Path:
    """Write a checkpoint of a random model whose texts do not end too soon."""
    model = confident_model(vocab_size=tokenizer.vocab_size, max_seq_len=context)
    config = Config(
        model=model.config,
        data=DataConfig(tokenizer="byte"),
        training=TrainingConfig(seq_len=context),
        sampling=SamplingConfig(**SAMPLING, max_new_tokens=7),
    )
    kit = checkpoint_metadata(config, tokenizer.state(), tokens=9, val_loss=2.5)
    if template is not None:
        kit["chat_template"] = template
    weights = {f"model.{name}": p for name, p in model.state_dict().items()}
    save_checkpoint({"state_dict": weights, "global_step": 3, "kit": kit}, path)
    return path


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until the condition is true; fail if it does not become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """Return the error of a response; assert its status and OpenAI's format."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) < 500
    assert "\n" not in error["message"]
    return error
