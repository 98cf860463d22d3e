"""Responses of the API: completions, chat completions, and streams of server-sent events.

A `ResponseBuilder` makes one response from the deltas of a call, either whole or as a stream.
"""

import math
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from pocketlm.serving.batcher import Batcher, Call, TextDelta, TokenLogprob
from pocketlm.serving.errors import (
    EngineFailed,
    TooBusy,
    api_error_from_failure,
    json_response,
    to_json,
)
from pocketlm.serving.limits import MIN_LOGPROB
from pocketlm.tokenizer.base import BEGIN_OF_TEXT, END_OF_TEXT, Tokenizer


class TokenFormatter:
    """Token ids as text and bytes, cached because a few frequent tokens occur again and again."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.format = cache(self._format)

    def _format(self, token_id: int) -> tuple[str, list[int] | None]:
        r"""Return a token's text and its bytes.

        The text of a token that is not valid UTF-8 is "bytes:" and its bytes as \x escapes. The
        special tokens around a document have no bytes.
        """
        special = {self.tokenizer.bos_id: BEGIN_OF_TEXT, self.tokenizer.eos_id: END_OF_TEXT}
        if token_id in special:
            return special[token_id], None
        spelling = self.tokenizer.token_bytes(token_id)
        try:
            return spelling.decode(), list(spelling)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling), list(spelling)


def finite(logprob: float | None) -> float:
    """Return the log-probability, or MIN_LOGPROB for minus infinity and NaN."""
    assert logprob is not None  # the engine computes it for requests with log-probabilities
    return MIN_LOGPROB if math.isnan(logprob) else max(logprob, MIN_LOGPROB)


def merge_deltas(deltas: Iterable[TextDelta]) -> list[TextDelta]:
    """Join the deltas of each text; return one delta per text, ordered by index."""
    merged: dict[int, TextDelta] = {}
    for delta in deltas:
        before = merged.get(delta.choice)
        if before is not None:
            delta = TextDelta(
                choice=delta.choice,
                text=before.text + delta.text,
                logprobs=before.logprobs + delta.logprobs,
                n_tokens=before.n_tokens + delta.n_tokens,
                finish_reason=delta.finish_reason,
            )
        merged[delta.choice] = delta
    return [merged[choice] for choice in sorted(merged)]


@dataclass
class ResponseBuilder:
    """Builder of one response; a subclass defines the format of an endpoint."""

    model: str
    formatter: TokenFormatter
    n_prompt_tokens: int
    with_logprobs: bool
    include_usage: bool = False  # in a stream; a whole response always has the token counts

    n_completion_tokens: int = 0
    started: set[int] = field(default_factory=set)  # texts with at least one streamed chunk
    has_text: set[int] = field(default_factory=set)  # texts with more than leading white space

    full_object: ClassVar[str]
    chunk_object: ClassVar[str]
    id_prefix: ClassVar[str]

    def __post_init__(self) -> None:
        self.envelope: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": "",
            "created": int(time.time()),
            "model": self.model,
        }

    def full_body(self, deltas: list[TextDelta]) -> bytes:
        """Return the whole response, given all deltas of the call."""
        self.n_completion_tokens = sum(delta.n_tokens for delta in deltas)
        choices = [self.full_choice(delta) for delta in merge_deltas(deltas)]
        body = {"object": self.full_object, "choices": choices, "usage": self.usage()}
        return to_json(self.envelope | body)

    def events(self, deltas: list[TextDelta]) -> bytes:
        """Return the server-sent events for new deltas; often none."""
        self.n_completion_tokens += sum(delta.n_tokens for delta in deltas)
        return b"".join(
            self.event([self.chunk_choice(delta)], None)
            for delta in merge_deltas(deltas)
            if delta.text or delta.logprobs or delta.finish_reason
        )

    def final_events(self) -> bytes:
        """Return the events that end a stream."""
        usage = self.event([], self.usage()) if self.include_usage else b""
        return usage + b"data: [DONE]\n\n"

    def event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
        """Return one server-sent event."""
        body = self.envelope | {"object": self.chunk_object, "choices": choices}
        if self.include_usage:
            body["usage"] = usage
        return b"data: " + to_json(body) + b"\n\n"

    def usage(self) -> dict[str, int]:
        """Return the token counts so far."""
        return {
            "prompt_tokens": self.n_prompt_tokens,
            "completion_tokens": self.n_completion_tokens,
            "total_tokens": self.n_prompt_tokens + self.n_completion_tokens,
        }

    def full_choice(self, delta: TextDelta) -> dict[str, Any]:
        """Return an entry of "choices" in a whole response."""
        raise NotImplementedError

    def chunk_choice(self, delta: TextDelta) -> dict[str, Any]:
        """Return an entry of "choices" in a streamed chunk."""
        raise NotImplementedError


class CompletionResponse(ResponseBuilder):
    """Response of /v1/completions."""

    full_object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def full_choice(self, delta: TextDelta) -> dict[str, Any]:
        return {
            "index": delta.choice,
            "text": delta.text,
            "logprobs": self.logprobs(delta.logprobs) if self.with_logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    chunk_choice = full_choice

    def logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, list[Any]]:
        """Return parallel lists; text_offset counts characters of the completion."""
        return {
            "tokens": [self.token_text(token.id) for _, token in logprobs],
            "token_logprobs": [finite(token.logprob) for _, token in logprobs],
            "top_logprobs": [self.top_logprobs(token.top) for _, token in logprobs],
            "text_offset": [offset for offset, _ in logprobs],
        }

    def top_logprobs(self, top: list[tuple[int, float]]) -> dict[str, float]:
        return {self.token_text(token_id): finite(logprob) for token_id, logprob in top}

    def token_text(self, token_id: int) -> str:
        return self.formatter.format(token_id)[0]


class ChatResponse(ResponseBuilder):
    """Response of /v1/chat/completions.

    White space at the beginning of an answer belongs to the format of the conversation, not to
    the answer, and is removed.
    """

    full_object, chunk_object = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def full_choice(self, delta: TextDelta) -> dict[str, Any]:
        return {
            "index": delta.choice,
            "message": {"role": "assistant", "content": delta.text.lstrip()},
            "logprobs": self.logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }

    def chunk_choice(self, delta: TextDelta) -> dict[str, Any]:
        text = delta.text if delta.choice in self.has_text else delta.text.lstrip()
        role = {} if delta.choice in self.started else {"role": "assistant"}
        self.started.add(delta.choice)
        if text:
            self.has_text.add(delta.choice)
        return {
            "index": delta.choice,
            "delta": role | {"content": text},
            "logprobs": self.logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }

    def logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = []
        for _, token in logprobs:
            top = [self.token_entry(token_id, logprob) for token_id, logprob in token.top]
            content.append(self.token_entry(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def token_entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text, spelling = self.formatter.format(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": spelling}


class EventStream(Response):
    """A response that sends server-sent events as they come."""

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


async def respond(batcher: Batcher, call: Call, builder: ResponseBuilder, stream: bool) -> Response:
    """Return the response to a call, whole or as a stream.

    A failure before the first token becomes an error response; a later one is the stream's last
    event.
    """
    updates = batcher.read(call)
    if not stream:
        deltas = [delta async for update in updates for delta in update]
        return json_response(200, builder.full_body(deltas))
    first = await anext(updates)
    return EventStream(stream_events(first, updates, builder))


async def stream_events(
    first: list[TextDelta], updates: AsyncGenerator[list[TextDelta]], builder: ResponseBuilder
) -> AsyncGenerator[bytes]:
    """Yield server-sent events for the first update and all that follow."""
    async with aclosing(updates):
        yield builder.events(first)
        try:
            async for deltas in updates:
                yield builder.events(deltas)
        except (TooBusy, EngineFailed) as failure:
            yield b"data: " + api_error_from_failure(failure).body() + b"\n\n"
            return
        yield builder.final_events()
