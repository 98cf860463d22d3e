"""Serve a checkpoint to many at once, by OpenAI's API.

    python serve.py                                            # the best checkpoint there is, on http://127.0.0.1:8000
    python serve.py --ckpt checkpoints/smollm2.ckpt --dtype int8 --port 8080
    SERVE_API_KEY=... python serve.py --host 0.0.0.0           # for others than this machine: with a key only

/v1/models, /v1/completions and /v1/chat/completions, whole or streaming; /health, /metrics for Prometheus, and a page at /.
Requests share one running batch (batcher.py); what they and the answers look like is in openai_api.py. Here is the rest: who may
ask, how much, and for how long.
"""

import argparse
import asyncio
import base64
import gc
import hashlib
import hmac
import ipaddress
import json
import math
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import h11
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, disable_created_metrics, generate_latest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

import engine
from batcher import Batcher, Call, EngineFailed, Metrics, TooBusy
from chat import ANSWER, Conversation
from checkpoint import Checkpoint, best_checkpoint, load_checkpoint
from config import MOST_STOPS, SamplingParams
from errors import UserError, run_main
from infer import DTYPES, chosen_params, encode_prompt, place
from openai_api import (
    MAX_TOKENS,
    MOST_BIASES,
    MOST_LOGPROBS,
    MOST_PROMPTS,
    PROMPT_CHARACTERS,
    Answer,
    ApiError,
    Body,
    ChatAnswer,
    ChatBody,
    CompletionAnswer,
    CompletionBody,
    Spelling,
    finite,
    parse,
    to_json,
)
from quantize import QUANTIZED
from tokenizer import from_state

BODY_BYTES = 2**20
CONNECTIONS = 1000
HEAD_SECONDS = 10  # for a request line and headers to come
BODY_SECONDS = 30  # for a body to come
IDLE_SECONDS = 30  # a connection is kept without a request
WRITE_SECONDS = 30  # an answer waits for a client that does not read
STOP_SECONDS = 5  # for the last answers to leave, at the end
COMPLETION_TOKENS = 16  # OpenAI's default
KEY_VARIABLE = "SERVE_API_KEY"
PAGE = Path(__file__).with_name("web") / "index.html"


class Service:
    """A checkpoint and the batch that it answers in."""

    def __init__(self, checkpoint: Checkpoint, about: dict[str, Any], threads: int, rows: int, most_waiting: int, deadline: float):
        self.checkpoint, self.rows, self.deadline = checkpoint, rows, deadline
        self.most_prompts = min(MOST_PROMPTS, most_waiting)
        self.context, self.vocab_size = checkpoint.config.model.max_seq_len, checkpoint.config.model.vocab_size
        self.spelling = Spelling(checkpoint.tokenizer)
        try:
            self.batcher = Batcher(checkpoint.model, checkpoint.tokenizer, threads, rows, most_waiting)
        except (OSError, RuntimeError) as error:
            said = str(error).splitlines()[0]
            raise UserError(f"no memory for {rows} rows of {self.context:,} tokens: {said}; lower --rows") from None
        # Encoding sets a flag of the tokenizer while another thread may decode; so it has a tokenizer and a thread of its own
        self.conversation = Conversation(from_state(checkpoint.tokenizer.state()), checkpoint.chat_template)
        self.encoding = ThreadPoolExecutor(1, "encoding")
        self.stop_ids = self.conversation.stop_ids
        self.model = self.describe(about)

    def describe(self, about: dict[str, Any]) -> dict[str, Any]:
        """What /v1/models says."""
        path, sampling = self.checkpoint.path, self.checkpoint.config.sampling
        limits = {
            "max_tokens": MAX_TOKENS,
            "n": self.rows,
            "prompts": self.most_prompts,
            "prompt_tokens": self.context,
            "prompt_characters": PROMPT_CHARACTERS,
            "logprobs": self.most_logprobs,
            "stop": MOST_STOPS,
            "logit_bias": MOST_BIASES,
            "body_bytes": BODY_BYTES,
            "seconds": self.deadline,
        }
        defaults = {field.name: getattr(sampling, field.name) for field in fields(SamplingParams)}
        defaults["logit_bias"] = [(i, finite(bias)) for i, bias in sampling.logit_bias]
        return {
            "id": path.stem,
            "object": "model",
            "created": int(path.stat().st_mtime),
            "owned_by": "you",
            "checkpoint": about,
            "sampling": defaults,
            "chat": "template" if self.checkpoint.chat_template else "turns",
            "limits": limits,
        }

    @property
    def most_logprobs(self) -> int:
        return min(MOST_LOGPROBS, self.vocab_size)

    def check_model(self, name: str) -> None:
        if name != self.model["id"]:
            raise ApiError(404, f"there is no model {name[:100]!r} here; there is {self.model['id']!r}", "model", "model_not_found")

    async def encode(self, param: str, function: Callable[..., list[int]], *given: Any) -> list[int]:
        """The ids of a prompt."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.encoding, function, *given)
        except UserError as error:
            raise ApiError(400, str(error), param, "invalid_value") from None

    async def complete(self, body: CompletionBody) -> tuple[Call, Answer]:
        """Begin completions. Raises ApiError and TooBusy, as `reply` does."""
        self.check_model(body.model)
        if len(body.prompt) > self.most_prompts:
            said = f"prompt has {len(body.prompt):,} entries; it may have {self.most_prompts}"
            raise ApiError(400, said, "prompt", "array_above_max_length")
        check_characters("prompt", sum(len(prompt) for prompt in body.prompt if isinstance(prompt, str)))
        self.batcher.room_for(len(body.prompt))
        tokenizer, prompts = self.conversation.tokenizer, []
        for prompt in body.prompt:
            ids = await self.encode("prompt", encode_prompt, tokenizer, prompt) if isinstance(prompt, str) else prompt
            prompts.append(ids)
        return self.ask(CompletionAnswer, "prompt", prompts, body, body.sampling(body.max_tokens, COMPLETION_TOKENS))

    async def reply(self, body: ChatBody) -> tuple[Call, Answer]:
        """Begin answers to a conversation."""
        self.check_model(body.model)
        check_characters("messages", sum(len(message.content) for message in body.messages))
        self.batcher.room_for(1)
        roles = {"developer": "system"}
        messages = [{"role": roles.get(message.role, message.role), "content": message.content} for message in body.messages]
        ids = await self.encode("messages", self.conversation.encode, messages)
        most = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
        given = body.sampling(most, max(1, min(ANSWER, self.context - len(ids))))
        said = self.checkpoint.config.sampling
        given["stop"] = (*given.get("stop", said.stop), *self.conversation.stops)
        given["stop_ids"] = (*given.get("stop_ids", said.stop_ids), *self.stop_ids)
        return self.ask(ChatAnswer, "messages", [ids], body, given)

    def ask(self, shape: type[Answer], param: str, prompts: list[list[int]], body: Body, given: dict[str, Any]) -> tuple[Call, Answer]:
        """Check all that is asked, and begin."""
        try:
            params = chosen_params(given, self.checkpoint)
            requests = [engine.Request(ids, params, self.checkpoint.tokenizer.eos_id, body.likeliest) for ids in prompts]
            for request in requests:
                engine.check(request, self.vocab_size)
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            known = name in {field.name for field in fields(SamplingParams)}
            name = {"max_new_tokens": "max_tokens", "num_samples": "n"}.get(name, name)
            raise ApiError(400, f"{name} {rest}" if known else str(error), name if known else param, "invalid_value") from None
        limits = {"max_tokens": (params.max_new_tokens, MAX_TOKENS), "n": (params.num_samples, self.rows)}
        limits[body.likeliest_name] = (body.likeliest or 0, self.most_logprobs)
        for name, (asked, most) in limits.items():
            if asked > most:
                raise ApiError(400, f"{name} is {asked:,}; here it may be {most:,}", name, "invalid_value")
        longest = max(map(len, prompts))
        if longest > self.context:
            said = f"the prompt has {longest:,} tokens, and this model's context {self.context:,}; shorten it"
            raise ApiError(400, said, param, "context_length_exceeded")
        call = self.batcher.ask(requests, self.deadline, bool(body.stream))
        usage_told = bool(body.stream_options and body.stream_options.include_usage)
        told = body.likeliest is not None
        return call, shape(self.model["id"], self.spelling, sum(map(len, prompts)), told, usage_told)


def check_characters(param: str, count: int) -> None:
    """Before they are made into tokens, which takes time."""
    if count > PROMPT_CHARACTERS:
        said = f"{param}: {count:,} characters; there may be {PROMPT_CHARACTERS:,}"
        raise ApiError(400, said, param, "string_above_max_length")


class EventStream(Response):
    """Server-sent events as they come."""

    def __init__(self, events: AsyncGenerator[bytes]):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self.events) as events:
            async for event in events:
                if event:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def respond(batcher: Batcher, call: Call, answer: Answer, stream: bool) -> Response:
    """The answer, whole or as events. What fails before the first token is an error; after it, the stream's last event."""
    pieces = batcher.read(call)
    if not stream:
        return json_response(200, answer.whole([piece async for news in pieces for piece in news]))
    first = await anext(pieces)

    async def events() -> AsyncGenerator[bytes]:
        async with aclosing(pieces):
            yield answer.chunks(first)
            try:
                async for news in pieces:
                    yield answer.chunks(news)
            except (TooBusy, EngineFailed) as failure:
                yield b"data: " + as_api_error(failure).body() + b"\n\n"
                return
            yield answer.last()

    return EventStream(events())


def as_api_error(failure: Exception) -> ApiError:
    if isinstance(failure, ApiError):
        return failure
    if isinstance(failure, TooBusy):
        return ApiError(failure.status, str(failure), code="too_busy", retry_after="1")
    said = "the engine failed, and has begun anew; the server's own output says why. Ask again"
    return ApiError(500, said, code="engine_failed")


def json_response(status: int, body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


# ---- who may ask -----------------------------------------------------------------------------------------------------


class Guard:
    """In front of the app: which hosts, origins and keys, how large a body; and an end to what nobody waits for any more."""

    def __init__(self, app: ASGIApp, metrics: Metrics, hosts: set[str] | None, key: str | None):
        self.app, self.metrics, self.hosts, self.key = app, metrics, hosts, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self.admit(scope)
                body = await self.read(scope, receive)
            except ApiError as error:
                await json_response(error.status, error.body(), error.headers)(scope, receive, watched)
            else:
                await self.unless_gone(scope, body, receive, watched)
        except ClientDisconnect:
            pass
        finally:
            path = "/v1/models" if scope["path"].startswith("/v1/models/") else scope["path"]
            self.metrics.requests.labels(path if path in PATHS else "other", status).inc()
        return None

    def admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if self.hosts is not None and host not in self.hosts:  # a page of another site, by a name that it points here
            raise ApiError(403, f"the Host {host[:100]!r} is not this server; ask for http://{min(self.hosts)}", code="wrong_host")
        if self.key is not None and scope["path"].startswith("/v1/"):
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.key}".encode()):
                said = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
                raise ApiError(401, said, code="invalid_api_key", www_authenticate="Bearer")
        if scope["method"] == "POST":
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc.lower() != host:
                raise ApiError(403, f"pages of {origin[:100]!r} may not ask this server", code="wrong_origin")
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, f"the Content-Type is {kind[:100]!r}; send application/json", code="unsupported_media_type")

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The body, counted as it comes."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message["body"]
                    if len(body) > BODY_BYTES:
                        raise ApiError(413, f"the body is larger than {BODY_BYTES:,} bytes", code="body_too_large", connection="close")
                    if not message["more_body"]:
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS} seconds", code="timeout", connection="close") from None

    async def unless_gone(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the app, until its client leaves: then the app is cancelled where it waits, and what it asked for with it."""

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        app, gone = asyncio.ensure_future(self.app(scope, replay, send)), asyncio.ensure_future(receive())
        try:
            await asyncio.wait({app, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not app.done():
                app.cancel()
        with suppress(asyncio.CancelledError):
            await app


class Connection(H11Protocol):
    """uvicorn's, which also gives up on clients that are slow to ask or to read, and refuses what is not HTTP in JSON."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.stalled: asyncio.TimerHandle | None = None
        self.asking = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self.asking.cancel()
        elif self.asking.cancelled():
            self.asking = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stalled:
            self.stalled.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self.asking.cancel()
        if self.stalled:
            self.stalled.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        body = ApiError(400, "this is not an HTTP request, or its headers are too long").body()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


# ---- the app ---------------------------------------------------------------------------------------------------------

PATHS = {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}


def build_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start(asyncio.get_running_loop())
        yield
        service.batcher.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan, redirect_slashes=False)
    page, policy = read_page()

    @app.get("/")
    async def index() -> Response:
        if page is None:
            raise ApiError(404, "there is no page here (web/index.html is missing); the API is under /v1", code="not_found")
        return Response(page, media_type="text/html", headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})

    @app.get("/health")
    async def health() -> Response:
        return json_response(200, to_json({"status": "ok"}))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.batcher.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response(200, to_json({"object": "list", "data": [service.model]}))

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return json_response(200, to_json(service.model))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse(CompletionBody, await request.body())
        return await respond(service.batcher, *await service.complete(body), bool(body.stream))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse(ChatBody, await request.body())
        return await respond(service.batcher, *await service.reply(body), bool(body.stream))

    async def failed(request: Request, failure: Exception) -> Response:
        error = as_api_error(failure)
        return json_response(error.status, error.body(), error.headers)

    async def refused(request: Request, refusal: HTTPException) -> Response:
        said = {404: f"there is nothing at {request.url.path[:100]}", 405: f"{request.method} is no method of {request.url.path[:100]}"}
        code = {404: "not_found", 405: "method_not_allowed"}.get(refusal.status_code)
        error = ApiError(refusal.status_code, said.get(refusal.status_code, str(refusal.detail)), code=code)
        return json_response(error.status, error.body(), dict(refusal.headers or {}))

    async def broken(request: Request, failure: Exception) -> Response:
        error = ApiError(500, "the server failed at this request; its own output says why", code="server_error")
        return json_response(500, error.body())

    for kind in (ApiError, TooBusy, EngineFailed):
        app.add_exception_handler(kind, failed)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, broken)
    return app


def read_page() -> tuple[str | None, str]:
    """The page, and the policy that lets its own scripts and styles run and no others."""
    if not PAGE.is_file():
        return None, ""
    text = PAGE.read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        inline = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", text, re.DOTALL | re.IGNORECASE)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in inline) or "'none'"

    rules = {"default-src": "'none'", "script-src": hashes("script"), "style-src": hashes("style"), "connect-src": "'self'"}
    rules |= {"img-src": "data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"}
    return text, "; ".join(f"{name} {value}" for name, value in rules.items())


# ---- the command line ------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """uvicorn's, which on a signal also ends the answers that run."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher):
        super().__init__(config)
        self.batcher = batcher

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.batcher.close()
        super().handle_exit(sig, frame)


def build_server(service: Service, hosts: set[str] | None, key: str | None) -> Server:
    """hosts: what a Host header may be; None: anything. key: what /v1 asks for; None: nothing."""
    app = Guard(build_app(service), service.batcher.metrics, hosts, key)
    config = uvicorn.Config(
        app, http=Connection, ws="none", lifespan="on", log_level="error", access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=CONNECTIONS, timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=STOP_SECONDS,
    )  # fmt: skip
    return Server(config, service.batcher)


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
        raise UserError(f"cannot listen on {host}, port {port}: {reason}; give another --port or --host") from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a checkpoint by OpenAI's API.")
    parser.add_argument("--ckpt", help="checkpoint; by default the best there is")
    parser.add_argument("--host", default="127.0.0.1", help="other than this machine's own (%(default)s) needs an API key")
    parser.add_argument("--port", type=int, default=8000, help="%(default)s; 0 is any that is free")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "mps", "cuda"])
    parser.add_argument("--dtype", choices=[*DTYPES, *QUANTIZED], help="of the weights; float32, or what a quantised checkpoint has")
    parser.add_argument("--api-key", help=f"asked of whoever uses /v1; better in the environment, as {KEY_VARIABLE}")
    parser.add_argument("--rows", type=int, default=16, help="texts that grow side by side (%(default)s); each has a cache of a context")
    parser.add_argument("--queue", type=int, default=128, help="requests that may wait for a row (%(default)s)")
    parser.add_argument("--deadline", type=float, default=300, help="seconds after which an answer is cut (%(default)s)")
    args = parser.parse_args(argv)
    for name, most in (("rows", 1024), ("queue", 100_000), ("deadline", 86_400)):
        if not 1 <= getattr(args, name) <= most:
            raise UserError(f"--{name} {getattr(args, name)}: it is from 1 to {most:,}")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port {args.port}: a port is from 0 to 65535")
    args.api_key = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE)
    if args.api_key is not None and not (args.api_key.isascii() and args.api_key.isprintable() and args.api_key.strip()):
        raise UserError("the API key is empty or not plain ASCII; choose letters and digits")
    if not is_loopback(args.host) and args.api_key is None:
        raise UserError(f"--host {args.host} lets others than this machine in: set {KEY_VARIABLE} to a key that they must have")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    at = listen(args.host, args.port)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with a team for this thread and one for the engine's, OpenMP lets both sleep after every step
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
    hosts = {f"{each}:{port}" for each in names} | (names if port == 80 else set()) if is_loopback(args.host) else None
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: None)  # uvicorn raises what it caught once more at the end: nothing is left to do then
    print(f"{checkpoint.path}: step {checkpoint.step}, {about['dtype']}, {args.rows} rows of {service.context:,} tokens", file=sys.stderr)
    print(f"http://{name}:{port}  (Ctrl-C stops)", file=sys.stderr)
    asked = json.dumps({"model": service.model["id"], "prompt": "" if checkpoint.tokenizer.prefix else "the", "max_tokens": 40})
    key = f""" -H "Authorization: Bearer ${KEY_VARIABLE}\"""" if args.api_key else ""
    print(f"curl http://{name}:{port}/v1/completions -H 'Content-Type: application/json'{key} -d '{asked}'", file=sys.stderr, flush=True)
    gc.freeze()  # what is there stays, and need not be searched for garbage again and again
    build_server(service, hosts, args.api_key).run(sockets=[at])
    return 0


if __name__ == "__main__":
    run_main(main)
