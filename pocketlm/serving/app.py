"""The HTTP application and its server: endpoints, error responses, web page, connections."""

import asyncio
import base64
import hashlib
import ipaddress
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import APIRouter, FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from uvicorn.protocols.http.h11_impl import H11Protocol

from pocketlm.serving.batcher import Batcher
from pocketlm.serving.errors import (
    ApiError,
    EngineFailed,
    TooBusy,
    api_error_from_failure,
    json_response,
    to_json,
)
from pocketlm.serving.limits import MAX_QUOTED_CHARACTERS, ServerLimits
from pocketlm.serving.middleware import AccessMiddleware
from pocketlm.serving.requests import ChatBody, CompletionBody, RequestBody, parse
from pocketlm.serving.responses import respond
from pocketlm.serving.service import Service

SCHEMA_PATH = "#/components/schemas/{model}"
PAGE = Path(__file__).with_name("page") / "index.html"


class Endpoints:
    """Handlers of the server's paths."""

    def __init__(self, service: Service):
        self.service = service
        self.page, self.page_policy = read_page()

    def router(self) -> APIRouter:
        """Return the table of paths."""
        router = APIRouter(redirect_slashes=False)
        for path, get in (
            ("/", self.index),
            ("/health", self.health),
            ("/metrics", self.metrics),
            ("/v1/models", self.models),
            ("/v1/models/{name:path}", self.model),
        ):
            router.add_api_route(path, get, methods=["GET"])
            router.add_api_route(path, get, methods=["HEAD"], include_in_schema=False)
        for path, post, body in (
            ("/v1/completions", self.complete, CompletionBody),
            ("/v1/chat/completions", self.chat, ChatBody),
        ):
            router.add_api_route(path, post, methods=["POST"], openapi_extra=json_body(body))
        return router

    async def index(self) -> Response:
        if self.page is None:
            message = "the page is missing (page/index.html); the API is under /v1"
            raise ApiError(404, message, code="not_found")
        headers = {"content-security-policy": self.page_policy, "referrer-policy": "no-referrer"}
        return Response(self.page, media_type="text/html", headers=headers)

    async def health(self) -> Response:
        return json_response(200, to_json({"status": "ok"}))

    async def metrics(self) -> Response:
        metrics = generate_latest(self.service.batcher.metrics.registry)
        return Response(metrics, headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(self) -> Response:
        models = [self.service.model | {"id": name} for name in self.service.names]
        return json_response(200, to_json({"object": "list", "data": models}))

    async def model(self, name: str) -> Response:
        self.service.check_model(name)
        return json_response(200, to_json(self.service.model | {"id": name}))

    async def complete(self, request: HttpRequest) -> Response:
        body = parse(CompletionBody, await request.body())
        call, builder = await self.service.start_completion(body, client_of(request))
        return await respond(self.service.batcher, call, builder, bool(body.stream))

    async def chat(self, request: HttpRequest) -> Response:
        body = parse(ChatBody, await request.body())
        call, builder = await self.service.start_chat(body, client_of(request))
        return await respond(self.service.batcher, call, builder, bool(body.stream))


def client_of(request: HttpRequest) -> str:
    """Return who shares the server: the address of a request, of IPv6 that of its network.

    A site has a whole network (/64) of IPv6 addresses. All clients behind a proxy are one.
    """
    try:
        address = ipaddress.ip_address(request.client.host if request.client else "")
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address), 64), strict=False))


def json_body(kind: type[RequestBody]) -> dict[str, Any]:
    """Return the part of an endpoint's OpenAPI description that has its request body."""
    schema = {"$ref": SCHEMA_PATH.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class App(FastAPI):
    """An app whose OpenAPI description, /openapi.json, has the schemas of the request bodies."""

    def openapi(self) -> dict[str, Any]:
        description = super().openapi()
        _, bodies = models_json_schema(
            [(CompletionBody, "validation"), (ChatBody, "validation")], ref_template=SCHEMA_PATH
        )
        description["components"]["schemas"].update(bodies["$defs"])
        return description


# ---- errors ----


async def handle_failure(request: HttpRequest, failure: Exception) -> Response:
    """Return the response to an ApiError, TooBusy or EngineFailed."""
    return api_error_from_failure(failure).response()


async def handle_http_exception(request: HttpRequest, exception: HTTPException) -> Response:
    """Return the response to an unknown path or method, in OpenAI's format."""
    path = request.url.path[:MAX_QUOTED_CHARACTERS]
    message, code = {
        404: (f"the path {path} does not exist", "not_found"),
        405: (f"{path} does not support the method {request.method}", "method_not_allowed"),
    }.get(exception.status_code, (str(exception.detail), None))
    error = ApiError(exception.status_code, message, code=code)
    return json_response(error.status, error.body(), dict(exception.headers or {}))


async def handle_bug(request: HttpRequest, exception: Exception) -> Response:
    """Return the response to an unexpected exception; uvicorn logs its traceback."""
    message = "the server failed to handle this request; its output has the details"
    return ApiError(500, message, code="server_error").response()


ExceptionHandler = Callable[[HttpRequest, Any], Coroutine[Any, Any, Response]]
EXCEPTION_HANDLERS: dict[int | type[Exception], ExceptionHandler] = {
    ApiError: handle_failure,
    TooBusy: handle_failure,
    EngineFailed: handle_failure,
    HTTPException: handle_http_exception,
    Exception: handle_bug,
}


# ---- the app ----


def build_app(service: Service) -> FastAPI:
    """Return the app; it starts and stops the service's batcher."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start(asyncio.get_running_loop())
        yield
        service.batcher.close()

    app = App(
        title="pocketlm",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.include_router(Endpoints(service).router())
    return app


# ---- the page ----


def read_page() -> tuple[str | None, str]:
    """Return the page and its Content-Security-Policy; None if the page is missing.

    The policy allows the page's own scripts and styles, by hash, and nothing else.
    """
    if not PAGE.is_file():
        return None, ""
    text = PAGE.read_text(encoding="utf-8")
    rules = {
        "default-src": "'none'",
        "script-src": inline_hashes(text, "script"),
        "style-src": inline_hashes(text, "style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return text, "; ".join(f"{name} {value}" for name, value in rules.items())


def inline_hashes(page: str, tag: str) -> str:
    """Return the policy's sources for the page's inline elements with this tag."""
    contents = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL | re.IGNORECASE)
    digests = [hashlib.sha256(content.encode()).digest() for content in contents]
    sources = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    return " ".join(sources) or "'none'"


# ---- connections and the server ----


class TimeoutH11Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with timeouts, and JSON errors for what is not HTTP.

    It aborts the connection of a client that is too slow to send a request or to read a
    response. (The access middleware has the timeout for bodies.)
    """

    def __init__(self, *, limits: ServerLimits, **options: Any):
        super().__init__(**options)
        self.limits = limits
        self.head_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # asyncio declares BaseTransport; a TCP server always passes a Transport, as uvicorn assumes
        super().connection_made(transport)
        self.start_head_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            cancel(self.head_timer)
        elif self.head_timer is None or self.head_timer.cancelled():
            self.start_head_timer()

    def start_head_timer(self) -> None:
        """Give the client `head_seconds` to send the head of its next request."""
        self.head_timer = self.loop.call_later(self.limits.head_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        cancel(self.write_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        cancel(self.head_timer)
        cancel(self.write_timer)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        message = "this is not an HTTP request, or its headers are too long"
        body = ApiError(400, message).body()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        response = h11.Response(status_code=400, headers=headers)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


def cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(uvicorn.Server):
    """uvicorn's server, which at shutdown also ends the texts in progress."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher):
        super().__init__(config)
        self.batcher = batcher

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.batcher.close()
        super().handle_exit(sig, frame)


def build_server(service: Service, hosts: set[str] | None, key: str | None) -> Server:
    """Return a server that accepts the given Host headers and API key; None: any."""
    limits = service.limits
    app = AccessMiddleware(build_app(service), service.batcher.metrics, limits, hosts, key)
    config = uvicorn.Config(
        app,
        # uvicorn only calls it, so a factory does as well as a class
        http=partial(TimeoutH11Protocol, limits=limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.max_connections,
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=limits.shutdown_seconds,
    )
    return Server(config, service.batcher)
