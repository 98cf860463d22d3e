"""Serve a checkpoint to many at once, by OpenAI's API.

    python serve.py                                            # the best checkpoint there is, on http://127.0.0.1:8000
    python serve.py --ckpt checkpoints/smollm2.ckpt --dtype int8 --port 8080
    SERVE_API_KEY=... python serve.py --host 0.0.0.0           # for others than this machine: with a key only

/v1/models, /v1/completions and /v1/chat/completions, whole or streaming; /health, /metrics for Prometheus, and a page at /.
Requests share one running batch (batcher.py); what they and the answers look like is in openai_api.py. Here is the rest: who may
ask, how much, and for how long.
"""

import argparse
import gc
import ipaddress
import json
import math
import os
import signal
import socket
import sys

import torch
from prometheus_client import disable_created_metrics

from pocketlm.checkpoint.loading import best_checkpoint, load_checkpoint
from pocketlm.errors import UserError, run_main
from pocketlm.inference.placement import DTYPES, place
from pocketlm.model.quantization import QUANTIZED
from pocketlm.serving.app import build_server
from pocketlm.serving.limits import CONNECTIONS
from pocketlm.serving.service import Service

KEY_VARIABLE = "SERVE_API_KEY"


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Raises UserError where the place is taken or none of ours."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=CONNECTIONS)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}; give another --port or --host"
        ) from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a checkpoint by OpenAI's API.")
    parser.add_argument("--ckpt", help="checkpoint; by default the best there is")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="other than this machine's own (%(default)s) needs an API key",
    )
    parser.add_argument("--port", type=int, default=8000, help="%(default)s; 0 is any that is free")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "mps", "cuda"])
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES, *QUANTIZED],
        help="of the weights; float32, or what a quantised checkpoint has",
    )
    parser.add_argument(
        "--api-key", help=f"asked of whoever uses /v1; better in the environment, as {KEY_VARIABLE}"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=16,
        help="texts that grow side by side (%(default)s); each has a cache of a context",
    )
    parser.add_argument(
        "--queue", type=int, default=128, help="requests that may wait for a row (%(default)s)"
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=300,
        help="seconds after which an answer is cut (%(default)s)",
    )
    args = parser.parse_args(argv)
    for name, most in (("rows", 1024), ("queue", 100_000), ("deadline", 86_400)):
        if not 1 <= getattr(args, name) <= most:
            raise UserError(f"--{name} {getattr(args, name)}: it is from 1 to {most:,}")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port {args.port}: a port is from 0 to 65535")
    args.api_key = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE)
    if args.api_key is not None and not (
        args.api_key.isascii() and args.api_key.isprintable() and args.api_key.strip()
    ):
        raise UserError("the API key is empty or not plain ASCII; choose letters and digits")
    if not is_loopback(args.host) and args.api_key is None:
        raise UserError(
            f"--host {args.host} lets others than this machine in: set {KEY_VARIABLE} to a key that they must have"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    at = listen(args.host, args.port)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # with a team for this thread and one for the engine's, OpenMP lets both sleep after every step
    checkpoint = load_checkpoint(args.ckpt or best_checkpoint())
    about = {
        "path": checkpoint.path.name,
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
        "val_loss": checkpoint.val_loss if math.isfinite(checkpoint.val_loss or 0) else None,
        "parameters": checkpoint.config.model.n_parameters,
        "context": checkpoint.config.model.max_seq_len,
        "vocab_size": checkpoint.config.model.vocab_size,
        "tokenizer": checkpoint.tokenizer.name,
        "sha256": checkpoint.weights_sha256,
    }  # before `place`, which may change the weights
    about["dtype"] = place(checkpoint, args.device, args.dtype)
    disable_created_metrics()  # a time for each number, which nobody reads
    service = Service(checkpoint, about, threads, args.rows, args.queue, args.deadline)
    port = at.getsockname()[1]
    name = f"[{args.host}]" if ":" in args.host else args.host
    names = {"localhost", "127.0.0.1", "[::1]", name.lower()}
    hosts = (
        {f"{each}:{port}" for each in names} | (names if port == 80 else set())
        if is_loopback(args.host)
        else None
    )
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            sig, lambda *_: None
        )  # uvicorn raises what it caught once more at the end: nothing is left to do then
    print(
        f"{checkpoint.path}: step {checkpoint.step}, {about['dtype']}, {args.rows} rows of {service.context:,} tokens",
        file=sys.stderr,
    )
    print(f"http://{name}:{port}  (Ctrl-C stops)", file=sys.stderr)
    asked = json.dumps(
        {
            "model": service.model["id"],
            "prompt": "" if checkpoint.tokenizer.prefix else "the",
            "max_tokens": 40,
        }
    )
    key = f""" -H "Authorization: Bearer ${KEY_VARIABLE}\"""" if args.api_key else ""
    print(
        f"curl http://{name}:{port}/v1/completions -H 'Content-Type: application/json'{key} -d '{asked}'",
        file=sys.stderr,
        flush=True,
    )
    gc.freeze()  # what is there stays, and need not be searched for garbage again and again
    build_server(service, hosts, args.api_key).run(sockets=[at])
    return 0


if __name__ == "__main__":
    run_main(main)
