"""Serve a checkpoint to many clients at once, with OpenAI's API and a web page.

    python serve.py                                   # the best checkpoint, http://127.0.0.1:8000
    python serve.py --ckpt checkpoints/smollm2.ckpt --dtype int8 --port 8080
    SERVE_API_KEY=... python serve.py --host 0.0.0.0  # for other machines, with an API key

The API has /v1/models, /v1/completions and /v1/chat/completions, whole or streamed; /health,
/metrics for Prometheus, and a page at /. All requests share one batch (continuous batching, see
pocketlm/serving/batcher.py).
"""

import argparse
import gc
import json
import os
import re
import signal
import socket
import sys

from pocketlm.errors import UserError, run_main
from pocketlm.startup import fast_imports

with fast_imports():
    import torch
    from prometheus_client import disable_created_metrics

    from pocketlm.checkpoint.loading import best_checkpoint, load_checkpoint
    from pocketlm.inference.placement import DTYPES, move_to_device
    from pocketlm.model.quantization import QUANTIZED_DTYPES
    from pocketlm.serving.app import build_server
    from pocketlm.serving.limits import (
        MAX_DEADLINE_SECONDS,
        MAX_NAME_CHARACTERS,
        MAX_QUEUE,
        MAX_SLOTS,
        ServerLimits,
    )
    from pocketlm.serving.middleware import allowed_hosts, is_loopback, url_host
    from pocketlm.serving.service import Service, describe_checkpoint

KEY_VARIABLE = "SERVE_API_KEY"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description="Serve a checkpoint with OpenAI's API.")
    parser.add_argument(
        "--ckpt", help="checkpoint (default: checkpoints/best.ckpt, or the best of the named runs)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; one that other machines can reach needs an API key "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port; 0: any free port (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "mps", "cuda"],
        help="device of the model (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES, *QUANTIZED_DTYPES],
        help="data type of the weights (default: the checkpoint's own if it is quantised, "
        "otherwise float32)",
    )
    parser.add_argument(
        "--api-key",
        help="key that clients must send for paths under /v1; the environment variable "
        f"{KEY_VARIABLE} is safer (default: none)",
    )
    add_client_options(parser)
    add_limit_options(parser)
    return parser


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for what clients call the model and the server."""
    parser.add_argument(
        "--model-name",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="name of the model in the API, the first of several in responses (default: the "
        "checkpoint's file name without .ckpt)",
    )
    parser.add_argument(
        "--allow-host",
        nargs="+",
        action="extend",
        default=[],
        metavar="HOST[:PORT]",
        help="further address at which clients reach this server, such as localhost:9000 through "
        "a tunnel: its Host header is accepted (default: none)",
    )


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the server's limits."""
    defaults = ServerLimits()
    parser.add_argument(
        "--rows",
        type=int,
        default=defaults.max_slots,
        help="slots: sequences generated at the same time, each with its own KV cache "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--queue",
        type=int,
        default=defaults.max_queue,
        help="maximum number of requests waiting for a slot (default: %(default)s)",
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=defaults.deadline_seconds,
        help="seconds after which an answer is cut off (default: %(default)s)",
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the checked options. Raises UserError."""
    args = build_parser().parse_args(argv)
    for name, maximum in (
        ("rows", MAX_SLOTS),
        ("queue", MAX_QUEUE),
        ("deadline", MAX_DEADLINE_SECONDS),
    ):
        value = getattr(args, name)
        if not 1 <= value <= maximum:
            raise UserError(f"--{name} is {value}; use a value from 1 to {maximum:,}")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port is {args.port}; use a port from 0 to 65535")
    check_names(args)
    if args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE)
    if args.api_key is not None and not is_usable_key(args.api_key):
        raise UserError("the API key is empty or not plain ASCII; use letters and digits")
    if args.api_key is None and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} accepts connections from other machines; "
            f"set {KEY_VARIABLE} to an API key for them"
        )
    return args


def check_names(args: argparse.Namespace) -> None:
    """Raise UserError for a --model-name or --allow-host that no client could send."""
    for name in args.model_name:
        if not (name.strip() and name.isprintable() and len(name) <= MAX_NAME_CHARACTERS):
            raise UserError(
                f"--model-name {name[:40]!r} is no name; use 1 to {MAX_NAME_CHARACTERS} characters"
            )
    for host in args.allow_host:
        if not re.fullmatch(r"[\w.-]+(:\d+)?|\[[\da-fA-F:.]+\](:\d+)?", host, re.ASCII):
            raise UserError(
                f"--allow-host {host[:40]!r} is not HOST or HOST:PORT, such as localhost:9000"
            )
    if args.allow_host and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} accepts every Host header already; leave --allow-host out"
        )


def is_usable_key(key: str) -> bool:
    """Return True if the key can be sent in an HTTP header."""
    return key.isascii() and key.isprintable() and bool(key.strip())


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError if the address is unusable or in use."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        backlog = ServerLimits().max_connections
        return socket.create_server(address[:2], family=family, backlog=backlog)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}; use another --port or --host"
        ) from None


def curl_command(service: Service, url: str, with_key: bool) -> str:
    """Return a command that requests a completion, for the start-up message."""
    prompt = "" if service.checkpoint.tokenizer.document_prefix else "the"
    body = json.dumps({"model": service.model["id"], "prompt": prompt, "max_tokens": 40})
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if with_key else ""
    return f"curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'"


def build_service(args: argparse.Namespace) -> Service:
    """Load the checkpoint and allocate the KV cache. Raises UserError."""
    threads = torch.get_num_threads()
    # The engine's thread has its own OpenMP team. If this thread had a team too, OpenMP would
    # put both to sleep after every step.
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(args.ckpt or best_checkpoint())
    info = describe_checkpoint(checkpoint)  # first, because move_to_device may quantise weights
    info["dtype"] = move_to_device(checkpoint, args.device, args.dtype)
    limits = ServerLimits(args.rows, args.queue, args.deadline)
    return Service(checkpoint, info, threads, limits, args.model_name)


def main(argv: list[str] | None = None) -> int:
    """Run the server until SIGINT or SIGTERM."""
    args = parse_args(argv)
    listener = listen(args.host, args.port)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # omit creation times from /metrics
    service = build_service(args)
    port = listener.getsockname()[1]
    url = f"http://{url_host(args.host)}:{port}"
    for sig in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises a caught signal again after its shutdown; by then there is nothing to do
        signal.signal(sig, lambda *_: None)
    print(
        f"{service.checkpoint.path}: step {service.checkpoint.step}, "
        f"{service.model['checkpoint']['dtype']}, {args.rows} slots of {service.context:,} tokens",
        f"{url}  (Ctrl-C stops)",
        curl_command(service, url, with_key=bool(args.api_key)),
        sep="\n",
        file=sys.stderr,
        flush=True,
    )
    gc.freeze()  # the garbage collector need not scan the loaded modules again and again
    hosts = allowed_hosts(args.host, port, args.allow_host)
    build_server(service, hosts, args.api_key).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    run_main(main)
