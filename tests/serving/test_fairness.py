"""A client that asks for much waits behind itself, and not in front of others."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request

from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.inference.engine import GenerationRequest
from pocketlm.serving.app import client_of
from pocketlm.serving.batcher import Batcher, Call
from pocketlm.serving.errors import TooBusy
from pocketlm.serving.limits import ServerLimits
from pocketlm.serving.service import Service
from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.checkpoints import confident_model
from tests.support.server import error_of, serving_in_thread, until, write_checkpoint


@asynccontextmanager
async def held_batcher(max_queue: int) -> AsyncIterator[tuple[Batcher, threading.Event]]:
    """Yield a batcher with one slot, whose engine begins when the event is set."""
    tokenizer = ByteTokenizer()
    model = confident_model(vocab_size=tokenizer.vocab_size)
    batcher = Batcher(model, tokenizer, threads=1, max_slots=1, max_queue=max_queue)
    begin = threading.Event()
    batcher.inbox.put(begin.wait)
    batcher.start(asyncio.get_running_loop())
    try:
        yield batcher, begin
    finally:
        begin.set()
        batcher.close()
        await asyncio.to_thread(batcher.thread.join)


def submit(batcher: Batcher, client: str, n: int = 1, tokens: int = 4) -> Call:
    params = SamplingParams(temperature=0, max_new_tokens=tokens)
    requests = [GenerationRequest([1, 2], params) for _ in range(n)]
    return batcher.submit(requests, seconds=60, client=client)


async def answered(batcher: Batcher, calls: list[Call], begin: threading.Event) -> list[str]:
    """Begin; return the clients in the order in which their calls end."""
    done: list[str] = []

    async def finish(call: Call) -> None:
        async for _ in batcher.read(call):
            pass
        done.append(call.client)

    readers = [asyncio.create_task(finish(call)) for call in calls]
    await asyncio.sleep(0)  # all are waiting when the first one ends
    begin.set()
    await asyncio.gather(*readers)
    return done


def order_of(*clients: tuple[str, int]) -> str:
    """Return the order in which requests of these clients and sizes are answered."""

    async def answers() -> list[str]:
        async with held_batcher(max_queue=9) as (batcher, begin):
            calls = [submit(batcher, client, tokens=tokens) for client, tokens in clients]
            return await answered(batcher, calls, begin)

    return "".join(asyncio.run(answers()))


def test_the_turns_go_round_among_the_clients() -> None:
    assert order_of(("a", 4), ("a", 4), ("a", 4), ("b", 4), ("b", 4), ("c", 4)) == "abcaba"


def test_a_request_for_many_tokens_costs_its_client_as_many_turns() -> None:
    """Of 3 + 2 + 9 tokens, the prompt's included, against 2 + 4 each."""
    assert order_of(("a", 9), ("a", 4), ("b", 4), ("b", 4), ("b", 4)) == "abbab"


def test_a_full_queue_gives_the_newest_place_of_the_client_with_most_to_one_with_fewer() -> None:
    async def fill() -> None:
        async with held_batcher(max_queue=3) as (batcher, begin):
            calls = [submit(batcher, "a") for _ in range(3)]
            with pytest.raises(TooBusy, match=r"queue is full: 3 of at most 3"):
                submit(batcher, "a")
            other = submit(batcher, "b")
            for client in "ab":  # 2 of a and 1 of b: neither gains by taking from the other
                with pytest.raises(TooBusy):
                    submit(batcher, client)
            with pytest.raises(TooBusy):
                submit(batcher, "c", n=2)
            assert batcher.waiting_by_client() == {"a": 2, "b": 1}
            assert await answered(batcher, [*calls[:2], other], begin) == ["a", "b", "a"]
            with pytest.raises(TooBusy, match="to a client with fewer requests"):
                await anext(batcher.read(calls[2]))
            assert not batcher.queue

    asyncio.run(fill())


def test_a_client_that_fills_the_queue_does_not_keep_another_one_out(tmp_path: Path) -> None:
    """Over HTTP, from two addresses of this machine."""
    path = write_checkpoint(tmp_path / "long.ckpt", ByteTokenizer(), context=4096)
    limits = ServerLimits(max_slots=1, max_queue=2)
    with serving_in_thread(load_checkpoint(path), limits) as server:
        running = server.start_long_completion()
        until(lambda: server.metrics()["serve_running_rows"] == 1)
        first, second = server.start_long_completion(), server.start_long_completion()
        until(lambda: server.metrics()["serve_waiting_requests"] == 2)
        body = {"model": server.name, "prompt": "x", "max_tokens": 1}
        refused = server.post("/v1/completions", json=body)
        assert error_of(refused, 429) and refused.headers["retry-after"] == "1"
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(transport=transport, base_url=server.url, timeout=60) as other:
            threading.Timer(0.2, running.close).start()
            assert other.post("/v1/completions", json=body).status_code == 200
        with second:
            assert b" 429 Too Many Requests" in second.recv(4096)
        first.close()


def test_prompts_are_encoded_in_turns(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "small.ckpt", ByteTokenizer())
    service = Service(load_checkpoint(path), {}, 1, ServerLimits())
    begin, done = threading.Event(), []

    def encode(client: str) -> None:
        begin.wait()
        done.append(client)

    async def encode_all() -> None:
        calls = [service.encode(client, "prompt", encode, client) for client in "aaabb"]
        asyncio.get_running_loop().call_later(0.01, begin.set)
        await asyncio.gather(*calls)

    asyncio.run(encode_all())
    assert "".join(done) == "ababa"
    assert not service.encoding


@pytest.mark.parametrize(
    "address, client",
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", ""),
    ],
)
def test_a_client_is_an_address_or_the_network_of_a_site(address: str, client: str) -> None:
    assert client_of(Request({"type": "http", "client": (address, 5)})) == client
