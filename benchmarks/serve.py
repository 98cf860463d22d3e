"""The server's throughput: one client, and many at once.

`serve.py` is started for each dtype, and asked by as many threads of this process as there are clients, on the same cores. Each asks for so
many tokens behind the same nine words, sampled, with a seed of its own. All rounds of one client and of many take turns.
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
from statistics import median

from rich.table import Table

from benchmarks.measure import OUT, ROOT
from pocketlm.errors import UserError

PROMPT = "The history of the river and of the city"


@contextmanager
def serving(ckpt: str, dtype: str, clients: int) -> Iterator[tuple[int, str]]:
    """A server's port, and its model's name."""
    command = [
        sys.executable,
        ROOT / "serve.py",
        "--ckpt",
        ckpt,
        "--dtype",
        dtype,
        "--port",
        "0",
        "--rows",
        str(clients),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = [server.stderr.readline() for _ in range(3)]
            if not (place := re.match(r"http://127.0.0.1:(\d+)", said[1])):
                raise UserError(
                    f"serve.py did not start: {said[0].strip().removeprefix('error: ')}"
                )
            yield int(place[1]), re.search(r'"model": "(.*?)"', said[2])[1]
        finally:
            server.terminate()


def ask(port: int, model: str, tokens: int, seed: int, stream: bool) -> int:
    """Tokens of one answer."""
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": tokens,
        "seed": seed,
        "temperature": 0.8,
        "stream": stream,
    }
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    if answer.status != 200:
        raise UserError(f"the server refused: {json.loads(text)['error']['message']}")
    last = (
        [line for line in text.split("\n\n") if line.startswith("data: {")][-1].removeprefix(
            "data: "
        )
        if stream
        else text
    )
    return json.loads(last)["usage"]["completion_tokens"]


def rate(port: int, model: str, tokens: int, clients: int, stream: bool) -> float:
    """Tokens a second of all clients together."""
    with ThreadPoolExecutor(clients) as threads:
        begin = time.perf_counter()
        answers = list(
            threads.map(lambda seed: ask(port, model, tokens, seed, stream), range(clients))
        )
    return sum(answers) / (time.perf_counter() - begin)


def bench_serve(args: argparse.Namespace) -> int:
    table = Table(box=None)
    for column in ("", "1 client, tokens/s", "each", f"{args.clients} clients", "each", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for dtype in args.dtypes:
        with serving(args.ckpt, dtype, args.clients) as (port, model):
            ask(port, model, 2, 0, False)  # what only the first call takes
            for stream in (True, False):
                rounds = [
                    (
                        rate(port, model, args.tokens, 1, stream),
                        rate(port, model, args.tokens, args.clients, stream),
                    )
                    for _ in range(args.repeat)
                ]
                one, many = zip(*rounds, strict=True)
                cells = [
                    cell
                    for rates in (one, many)
                    for cell in (f"{median(rates):,.0f}", " ".join(f"{each:.0f}" for each in rates))
                ]
                table.add_row(
                    f"{dtype}, {'streaming' if stream else 'whole'}",
                    *cells,
                    f"{median(many) / median(one):.2f}",
                )
    OUT.print(f"{args.ckpt}, {args.tokens} tokens an answer")
    OUT.print(table)
    return 0
