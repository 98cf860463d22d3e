"""The server's throughput: one client, and many at once.

`serve.py` is started for each dtype and gets requests from one thread of this process per client,
on the same cores. Each request samples so many tokens after the same nine words, with a seed of its
own. Rounds of one client and of many take turns.
"""

import argparse
import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from rich.table import Table

from benchmarks.measure import OUT, ROOT, machine
from pocketlm.errors import UserError

PROMPT = "The history of the river and of the city"


@dataclass(frozen=True)
class Server:
    """A running server: its port, the name of its model, and its process."""

    port: int
    model: str
    pid: int


@contextmanager
def serving(ckpt: str, dtype: str, clients: int) -> Iterator[Server]:
    """Start serve.py; yield it when it is ready."""
    command = [sys.executable, ROOT / "serve.py", "--ckpt", ckpt, "--dtype", dtype]
    command += ["--port", "0", "--rows", str(clients)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            lines = [server.stderr.readline() for _ in range(3)]
            if not (address := re.match(r"http://127.0.0.1:(\d+)", lines[1])):
                reason = lines[0].strip().removeprefix("error: ")
                raise UserError(f"serve.py did not start: {reason}")
            yield Server(int(address[1]), re.search(r'"model": "(.*?)"', lines[2])[1], server.pid)
        finally:
            server.terminate()


def complete(server: Server, tokens: int, seed: int, stream: bool) -> int:
    """Request a completion; return its number of tokens."""
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": tokens}
    body |= {"seed": seed, "temperature": 0.8, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != 200:
        raise UserError(f"the server refused: {json.loads(text)['error']['message']}")
    if stream:
        events = [event for event in text.split("\n\n") if event.startswith("data: {")]
        text = events[-1].removeprefix("data: ")
    return json.loads(text)["usage"]["completion_tokens"]


def rate(server: Server, tokens: int, clients: int, stream: bool) -> float:
    """Return the tokens per second of all clients together."""
    with ThreadPoolExecutor(clients) as threads:
        begin = time.perf_counter()
        counts = threads.map(lambda seed: complete(server, tokens, seed, stream), range(clients))
        total = sum(counts)
    return total / (time.perf_counter() - begin)


def bench_serve(args: argparse.Namespace) -> int:
    """Print the throughput of one client and of many, streamed and not, for each dtype."""
    table = Table(box=None)
    for column in ("", "1 client, tokens/s", "each", f"{args.clients} clients", "each", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for dtype in args.dtypes:
        with serving(args.ckpt, dtype, args.clients) as server:
            complete(server, 2, 0, False)  # the first request warms up
            for stream in (True, False):
                one, many = [], []
                for _ in range(args.repeat):
                    one.append(rate(server, args.tokens, 1, stream))
                    many.append(rate(server, args.tokens, args.clients, stream))
                cells = []
                for rates in (one, many):
                    cells += [f"{median(rates):,.0f}", " ".join(f"{each:.0f}" for each in rates)]
                name = f"{dtype}, {'streaming' if stream else 'whole'}"
                table.add_row(name, *cells, f"{median(many) / median(one):.2f}")
    OUT.print(f"{args.ckpt}, {args.tokens} tokens an answer; {machine()}")
    OUT.print(table)
    return 0
