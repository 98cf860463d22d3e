"""The answers and the memory of a server under hostile, slow and vanishing clients.

    python -m benchmarks.soak --ckpt checkpoints/final.ckpt                 # two minutes
    python -m benchmarks.soak --ckpt examples/microgpt.ckpt --seconds 30

Each client makes one request after another, of a kind drawn at random. The answers to greedy
requests are compared with those that the server gave before, alone. Exit status 1: an answer was
wrong, or the server failed.
"""

import argparse
import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field

import psutil

from benchmarks.serve import Server, serving
from pocketlm.errors import UserError, run_main

PROMPTS = ["a", "the", "an", "be", "so"]
HOSTILE = [
    {"temperature": 1e-40},
    {"top_p": 1e-46},
    {"min_p": 1},
    {"no_repeat_ngram": 1},
    {"no_repeat_ngram": 10**9},
    {"repetition_penalty": 100, "frequency_penalty": -2, "presence_penalty": 2},
    {"logit_bias": {"1": 100, "2": -100}},
    {"stop": ["x" * 1000] * 64},
    {"logprobs": 5, "echo": True, "n": 4},
    {"max_tokens": -1},
]
BAD_BODIES = [b"", b"{", b"[" * 10_000, b"\xff", b'{"model": 1}', b'{"prompt": "\\ud800"}']


@dataclass
class Soak:
    """A server, the answers that it owes, and what has come so far."""

    server: Server
    answers: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    async def request(self, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a completion request; return the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.server.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        return reader, writer

    def body(self, prompt: str, **fields: object) -> bytes:
        default = {"model": self.server.model, "prompt": prompt, "max_tokens": 64}
        return json.dumps(default | fields).encode()

    async def exchange(self, body: bytes) -> tuple[int, bytes]:
        """Return the status and the body of a response."""
        reader, writer = await self.request(body)
        response = await reader.read()
        writer.close()
        head, _, content = response.partition(b"\r\n\r\n")
        return int(head.split()[1]), content

    # ---- what clients do ----

    async def ask(self, chance: random.Random) -> str:
        prompt = chance.choice(PROMPTS)
        status, content = await self.exchange(self.body(prompt, temperature=0))
        if status != 200:
            return f"status {status}"
        text = json.loads(content)["choices"][0]["text"]
        return "right" if text == self.answers[prompt] else "WRONG"

    async def be_hostile(self, chance: random.Random) -> str:
        fields = chance.choice(HOSTILE)
        status, _ = await self.exchange(self.body(chance.choice(PROMPTS), **fields))
        return f"hostile: status {status}"

    async def send_nonsense(self, chance: random.Random) -> str:
        status, _ = await self.exchange(chance.choice(BAD_BODIES))
        return f"nonsense: status {status}"

    async def vanish(self, chance: random.Random) -> str:
        fields = {"stream": chance.random() < 0.5, "max_tokens": 4000}
        _, writer = await self.request(self.body("a", **fields))
        await asyncio.sleep(chance.random())
        writer.close()
        return "vanished"

    async def read_slowly(self, chance: random.Random) -> str:
        reader, writer = await self.request(self.body("a", stream=True, logprobs=5))
        while await reader.read(200):
            await asyncio.sleep(0.05)
        writer.close()
        return "read slowly"

    async def client(self, number: int, end: float) -> None:
        """Make requests of random kinds until `end`, in the event loop's time."""
        chance = random.Random(number)
        kinds = [self.ask, self.be_hostile, self.send_nonsense, self.vanish, self.read_slowly]
        while asyncio.get_running_loop().time() < end:
            kind = chance.choices(kinds, weights=[4, 2, 1, 2, 1])[0]
            try:
                self.counts[await kind(chance)] += 1
            except (OSError, IndexError):  # refused or reset: the server has too many connections
                self.counts["no connection"] += 1
            await asyncio.sleep(chance.random())

    async def run(self, clients: int, seconds: float) -> list[int]:
        """Run all clients at once; return the server's memory (bytes) each second."""
        for prompt in PROMPTS:
            _, content = await self.exchange(self.body(prompt, temperature=0))
            self.answers[prompt] = json.loads(content)["choices"][0]["text"]
        loop, process, memory = asyncio.get_running_loop(), psutil.Process(self.server.pid), []
        end = loop.time() + seconds
        tasks = [asyncio.ensure_future(self.client(i, end)) for i in range(clients)]
        while not all(task.done() for task in tasks):
            memory.append(process.memory_info().rss)
            await asyncio.sleep(1)
        for task in tasks:
            task.result()
        return memory


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Stress a server and check its answers.")
    parser.add_argument("--ckpt", required=True, help="checkpoint to serve")
    parser.add_argument("--seconds", type=float, default=120, help="(default: %(default)s)")
    parser.add_argument("--clients", type=int, default=200, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.clients < 1:
        raise UserError(f"--clients is {args.clients}; it must be at least 1")
    with serving(args.ckpt, "float32", clients=16) as server:
        soak = Soak(server)
        memory = [round(rss / 1e6) for rss in asyncio.run(soak.run(args.clients, args.seconds))]
    for what, n in sorted(soak.counts.items()):
        print(f"{n:7,} {what}")
    middle = memory[len(memory) // 2 :]
    print(
        f"memory, MB: {memory[0]} at the start, {middle[0]} in the middle, {memory[-1]} at the end"
    )
    failed = [what for what in soak.counts if what == "WRONG" or "status 5" in what]
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
