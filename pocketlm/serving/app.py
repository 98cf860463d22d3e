"""The HTTP app: its paths, its page, its server."""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from pocketlm.serving.batcher import Batcher, EngineFailed, TooBusy
from pocketlm.serving.guard import AccessMiddleware, Connection
from pocketlm.serving.limits import CONNECTIONS, IDLE_SECONDS, STOP_SECONDS
from pocketlm.serving.requests import ApiError, ChatBody, CompletionBody, parse, to_json
from pocketlm.serving.responses import as_api_error, json_response, respond
from pocketlm.serving.service import Service

PAGE = Path(__file__).with_name("page") / "index.html"


def build_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start(asyncio.get_running_loop())
        yield
        service.batcher.close()

    app = FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan, redirect_slashes=False
    )
    page, policy = read_page()

    @app.get("/")
    async def index() -> Response:
        if page is None:
            raise ApiError(
                404,
                "there is no page here (web/index.html is missing); the API is under /v1",
                code="not_found",
            )
        return Response(
            page,
            media_type="text/html",
            headers={"content-security-policy": policy, "referrer-policy": "no-referrer"},
        )

    @app.get("/health")
    async def health() -> Response:
        return json_response(200, to_json({"status": "ok"}))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(
            generate_latest(service.batcher.metrics.registry),
            headers={"content-type": CONTENT_TYPE_LATEST},
        )

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
        said = {
            404: f"there is nothing at {request.url.path[:100]}",
            405: f"{request.method} is no method of {request.url.path[:100]}",
        }
        code = {404: "not_found", 405: "method_not_allowed"}.get(refusal.status_code)
        error = ApiError(
            refusal.status_code, said.get(refusal.status_code, str(refusal.detail)), code=code
        )
        return json_response(error.status, error.body(), dict(refusal.headers or {}))

    async def broken(request: Request, failure: Exception) -> Response:
        error = ApiError(
            500, "the server failed at this request; its own output says why", code="server_error"
        )
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
        return (
            " ".join(
                f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'"
                for each in inline
            )
            or "'none'"
        )

    rules = {
        "default-src": "'none'",
        "script-src": hashes("script"),
        "style-src": hashes("style"),
        "connect-src": "'self'",
    }
    rules |= {
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
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
    app = AccessMiddleware(build_app(service), service.batcher.metrics, hosts, key)
    config = uvicorn.Config(
        app, http=Connection, ws="none", lifespan="on", log_level="error", access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=CONNECTIONS, timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=STOP_SECONDS,
    )  # fmt: skip
    return Server(config, service.batcher)
