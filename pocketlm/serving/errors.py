"""Exceptions of the server, and error responses in OpenAI's format."""

import json
from typing import Any

from fastapi import Response

from pocketlm.serving.limits import RETRY_AFTER_SECONDS

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response: status, message, the field at fault, and OpenAI's error code."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        **headers: str,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> bytes:
        """Return the error as JSON in OpenAI's format."""
        default_type = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": str(self),
            "type": ERROR_TYPES.get(self.status, default_type),
            "param": self.param,
            "code": self.code,
        }
        return to_json({"error": error})

    def response(self) -> Response:
        """Return the error as an HTTP response."""
        return json_response(self.status, self.body(), self.headers)


class TooBusy(Exception):
    """A request without a slot: the queue is full (429), or no slot became free in time (503).

    The text is the message for the client.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class EngineFailed(Exception):
    """An exception in a decoding step; it ends the calls that it concerns."""


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error for a field with an unusable value."""
    return ApiError(400, message, param, code)


def invalid_json(message: str) -> ApiError:
    """Return the error for a body that is not a JSON object."""
    return ApiError(400, message, code="invalid_json")


def api_error_from_failure(failure: Exception) -> ApiError:
    """Return the error response for an ApiError, TooBusy or EngineFailed."""
    if isinstance(failure, ApiError):
        return failure
    if isinstance(failure, TooBusy):
        retry_after = str(RETRY_AFTER_SECONDS)
        return ApiError(failure.status, str(failure), code="too_busy", retry_after=retry_after)
    message = "the server failed to generate this text; its output has the details"
    return ApiError(500, message, code="engine_failed")


def to_json(value: Any) -> bytes:
    """Encode as ASCII JSON: a client's text that is not valid Unicode may be quoted in it."""
    return json.dumps(value, separators=(",", ":")).encode()


def json_response(status: int, body: bytes, headers: dict[str, str] | None = None) -> Response:
    """Return a response with a JSON body."""
    return Response(body, status, headers, media_type="application/json")
