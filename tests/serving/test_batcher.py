"""Continuous batching: shared steps, clients that leave, a full queue, shutdown, failures."""

import asyncio
import json
import re
import signal
import socket
from pathlib import Path

import pytest

from pocketlm.config.sampling import SamplingParams
from pocketlm.inference.engine import GenerationRequest
from pocketlm.inference.generate import generate_texts
from pocketlm.serving.batcher import Batcher
from pocketlm.serving.errors import EngineFailed
from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.checkpoints import confident_model
from tests.support.server import (
    RunningServer,
    error_of,
    read_all,
    serving,
    until,
    write_checkpoint,
)


def test_sixteen_texts_take_hardly_more_steps_than_one(server: RunningServer) -> None:
    """They join the batch at least a step apart."""
    never_ends = {str(server.checkpoint.tokenizer.eos_id): -100}
    before = server.metrics()["serve_step_rows_count"]
    server.complete(["hello"] * 16, max_tokens=200, temperature=0, logit_bias=never_ends)
    n_steps = server.metrics()["serve_step_rows_count"] - before
    assert 200 <= n_steps <= 200 + 16


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_slots(
    protected_server: RunningServer, stream: bool
) -> None:
    server = protected_server
    before = server.metrics()
    connection = server.start_long_completion(stream=stream, n=2)
    until(lambda: server.metrics()["serve_running_rows"] == 2)
    connection.close()
    until(lambda: server.metrics()["serve_running_rows"] == 0)
    after = server.metrics()
    assert after["serve_cancelled_total"] == before["serve_cancelled_total"] + 1
    n_tokens = after["serve_completion_tokens_total"] - before["serve_completion_tokens_total"]
    assert n_tokens < 2 * 4096


def read_response(connection: socket.socket) -> tuple[bytes, bytes]:
    """Return the head and the body of a response with a content length."""
    data = connection.recv(2**20)
    while b"\r\n\r\n" not in data:
        data += connection.recv(2**20)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    while len(body) < length:
        body += connection.recv(2**20)
    return head, body


def test_a_full_queue_refuses_and_a_deadline_cuts_texts_off(
    protected_server: RunningServer,
) -> None:
    """There are two slots and a queue of two.

    Of five requests at once two run, two wait and one is refused. After three seconds all others
    have a response.
    """
    server = protected_server
    running = [server.start_long_completion() for _ in range(2)]
    until(lambda: server.metrics()["serve_running_rows"] == 2)
    waiting = server.start_long_completion(prompt=["a", "b"])
    until(lambda: server.metrics()["serve_waiting_requests"] == 2)
    refused = server.post("/v1/completions", json={"model": server.name, "prompt": "x"})
    assert error_of(refused, 429)["type"] == "rate_limit_error"
    assert refused.headers["retry-after"] == "1"
    for connection in [*running, waiting]:
        with connection:
            head, body = read_response(connection)
        if b" 503 " in head.partition(b"\r\n")[0]:  # it got no slot before its deadline
            assert connection is waiting
            continue
        for choice in json.loads(body)["choices"]:
            assert choice["finish_reason"] == "length"
    until(lambda: server.metrics()["serve_running_rows"] == 0)
    assert server.metrics()["serve_waiting_requests"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_texts_in_progress_and_the_server_with_status_0(
    tmp_path: Path, sig: signal.Signals
) -> None:
    path = write_checkpoint(tmp_path / "long.ckpt", ByteTokenizer(), context=4096)
    with serving(path, "--rows", "2") as server:
        whole = server.start_long_completion()
        streamed = server.start_long_completion(stream=True)
        until(lambda: server.metrics()["serve_running_rows"] == 2)
        assert server.stop(sig) == ""
        for connection in (whole, streamed):
            with connection:
                response = read_all(connection)
            assert b" 200 OK" in response
            assert b'"finish_reason":"length"' in response
        assert response.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_an_exception_in_the_engine_ends_the_texts_and_not_the_thread() -> None:
    tokenizer = ByteTokenizer()
    model = confident_model(vocab_size=tokenizer.vocab_size)
    params = SamplingParams(temperature=0, max_new_tokens=5)

    def broken_step() -> None:
        raise ZeroDivisionError

    async def read_text(batcher: Batcher) -> str:
        call = batcher.submit([GenerationRequest([1, 2], params)], seconds=60)
        return "".join([delta.text async for deltas in batcher.read(call) for delta in deltas])

    async def fail_and_recover() -> str:
        batcher = Batcher(model, tokenizer, threads=1, max_slots=2, max_queue=8)
        batcher._engine.step = broken_step
        batcher.start(asyncio.get_running_loop())
        with pytest.raises(EngineFailed):
            await read_text(batcher)
        text = await read_text(batcher)
        batcher.close()
        await asyncio.to_thread(batcher.thread.join)
        return text

    assert asyncio.run(fail_and_recover()) == generate_texts(model, tokenizer, [[1, 2]], params)[0]
