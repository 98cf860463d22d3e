"""Access control in front of the app: hosts, origins, the API key, and request bodies."""

import asyncio
import hmac
import ipaddress
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pocketlm.serving.errors import ApiError
from pocketlm.serving.limits import MAX_QUOTED_CHARACTERS, ServerLimits
from pocketlm.serving.metrics import ServerMetrics

# Paths with their own label in the metrics; all others are counted together.
ENDPOINTS = {
    "/",
    "/health",
    "/metrics",
    "/openapi.json",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
}
CLIENT_DISCONNECTED = 499  # nginx's status for a request whose client left


def is_loopback(host: str) -> bool:
    """Return True if only this machine can connect to the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_host(host: str) -> str:
    """Return a host as it is written in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def allowed_hosts(host: str, port: int, others: Iterable[str] = ()) -> set[str] | None:
    """Return the Host headers to accept on a loopback address; None for any other address.

    The check protects against DNS rebinding: a web site could point its own name at 127.0.0.1.
    `others` are those of a tunnel or proxy, with their port unless it is the scheme's own.
    """
    if not is_loopback(host):
        return None
    names = {"localhost", "127.0.0.1", "[::1]", url_host(host).lower()}
    with_port = {f"{name}:{port}" for name in names}
    return with_port | (names if port == 80 else set()) | {other.lower() for other in others}


class AccessMiddleware:
    """ASGI middleware: checks Host, Origin, API key and body size, and counts requests.

    It cancels a request whose client disconnects. `hosts` are the accepted Host headers (None:
    any), `key` is the API key for paths under /v1 (None: no key needed).
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: ServerMetrics,
        limits: ServerLimits,
        hosts: set[str] | None,
        key: str | None,
    ):
        self.app, self.metrics, self.limits = app, metrics, limits
        self.hosts, self.key = hosts, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_DISCONNECTED

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.handle(scope, receive, send_and_note_status)
        except ClientDisconnect:
            pass
        finally:
            self.metrics.requests.labels(endpoint_label(scope["path"]), status).inc()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, read its body and run the app."""
        try:
            self.check_access(scope)
            body = await self.read_body(receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await self.run_while_connected(scope, body, receive, send)

    def check_access(self, scope: Scope) -> None:
        """Raise ApiError for a request that the headers do not allow."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if self.hosts is not None and host not in self.hosts:
            raise ApiError(
                403,
                f"the Host header {quote(host)} is not a name of this server; "
                f"use http://{min(self.hosts)}, or start serve.py with --allow-host and this name",
                code="wrong_host",
            )
        if scope["path"].startswith("/v1/"):
            self.check_key(headers)
        if scope["method"] == "POST":
            check_post_headers(headers, host)

    def check_key(self, headers: Headers) -> None:
        """Raise ApiError if a key is needed and the request has another one or none."""
        if self.key is None:
            return
        received = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(received, f"Bearer {self.key}".encode()):
            message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", www_authenticate="Bearer")

    async def read_body(self, receive: Receive) -> bytes:
        """Return the body. Raises ApiError if it is too large or too slow."""
        body, limits = bytearray(), self.limits
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message["body"]
                    if len(body) > limits.max_body_bytes:
                        raise ApiError(
                            413,
                            f"the body is larger than {limits.max_body_bytes:,} bytes",
                            code="body_too_large",
                            connection="close",
                        )
                    if not message["more_body"]:
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body was not complete after {limits.body_seconds} s",
                code="timeout",
                connection="close",
            ) from None

    async def run_while_connected(
        self, scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> None:
        """Run the app; cancel it, and the call it waits for, when the client disconnects."""

        async def receive_body() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        app = asyncio.ensure_future(self.app(scope, receive_body, send))
        disconnected = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({app, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            disconnected.cancel()
            if not app.done():
                app.cancel()
        with suppress(asyncio.CancelledError):
            await app


def check_post_headers(headers: Headers, host: str) -> None:
    """Raise ApiError for a POST from another site, or without JSON.

    A browser asks before it sends JSON to another site, so both checks together stop web pages
    that use the reader's browser to reach this server.
    """
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host:
        message = f"pages of {quote(origin)} may not use this server"
        raise ApiError(403, message, code="wrong_origin")
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"the Content-Type is {quote(media_type)}; send application/json"
        raise ApiError(415, message, code="unsupported_media_type")


def quote(text: str) -> str:
    """Return the beginning of a client's text in quotation marks."""
    return repr(text[:MAX_QUOTED_CHARACTERS])


def endpoint_label(path: str) -> str:
    """Return the label of a path in the metrics."""
    if path.startswith("/v1/models/"):
        return "/v1/models"
    return path if path in ENDPOINTS else "other"
