"""Who may ask: hosts, origins, keys, bodies, and connections that stall."""

import asyncio
import hmac
from contextlib import suppress
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pocketlm.serving.limits import BODY_BYTES, BODY_SECONDS, HEAD_SECONDS, WRITE_SECONDS
from pocketlm.serving.metrics import ServerMetrics
from pocketlm.serving.requests import ApiError
from pocketlm.serving.responses import json_response

# ---- who may ask -----------------------------------------------------------------------------------------------------


class AccessMiddleware:
    """In front of the app: which hosts, origins and keys, how large a body; and an end to what nobody waits for any more."""

    def __init__(
        self, app: ASGIApp, metrics: ServerMetrics, hosts: set[str] | None, key: str | None
    ):
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
                await json_response(error.status, error.body(), error.headers)(
                    scope, receive, watched
                )
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
        if (
            self.hosts is not None and host not in self.hosts
        ):  # a page of another site, by a name that it points here
            raise ApiError(
                403,
                f"the Host {host[:100]!r} is not this server; ask for http://{min(self.hosts)}",
                code="wrong_host",
            )
        if self.key is not None and scope["path"].startswith("/v1/"):
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.key}".encode()):
                said = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
                raise ApiError(401, said, code="invalid_api_key", www_authenticate="Bearer")
        if scope["method"] == "POST":
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc.lower() != host:
                raise ApiError(
                    403, f"pages of {origin[:100]!r} may not ask this server", code="wrong_origin"
                )
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(
                    415,
                    f"the Content-Type is {kind[:100]!r}; send application/json",
                    code="unsupported_media_type",
                )

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
                        raise ApiError(
                            413,
                            f"the body is larger than {BODY_BYTES:,} bytes",
                            code="body_too_large",
                            connection="close",
                        )
                    if not message["more_body"]:
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not come within {BODY_SECONDS} seconds",
                code="timeout",
                connection="close",
            ) from None

    async def unless_gone(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the app, until its client leaves: then the app is cancelled where it waits, and what it asked for with it."""

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        app, gone = (
            asyncio.ensure_future(self.app(scope, replay, send)),
            asyncio.ensure_future(receive()),
        )
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
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()


# ---- the app ---------------------------------------------------------------------------------------------------------

PATHS = {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}
