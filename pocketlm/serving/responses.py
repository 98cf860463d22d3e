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

from pocketlm.inference.engine import GenerationRequest, Token
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
from pocketlm.tokenizer.streaming import TextStream


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


def finite(logprob: float | None) -> float | None:
    """Return the log-probability, or MIN_LOGPROB for minus infinity and NaN.

    None, of the first token of a prompt, stays None.
    """
    if logprob is None:
        return None
    return MIN_LOGPROB if math.isnan(logprob) else max(logprob, MIN_LOGPROB)


@dataclass
class Echo:
    """A prompt that its completions repeat."""

    text: str
    offsets: list[int]  # characters of the text before each token
    request: GenerationRequest  # has the log-probabilities once there is a token after the prompt
    n_hidden: int  # tokens in front that are not of the text: the document prefix

    @classmethod
    def of(cls, tokenizer: Tokenizer, request: GenerationRequest, text: str | None) -> "Echo":
        """Return the echo of a request's prompt, which was given as a text unless that is None."""
        stream, decoded, offsets = TextStream(tokenizer), "", []
        for token_id in request.ids:
            offsets.append(len(decoded))
            decoded += stream.push(token_id)
        if text is None:
            return cls(decoded + stream.flush(), offsets, request, n_hidden=0)
        return cls(text, offsets, request, len(tokenizer.document_prefix))

    def logprobs(self) -> list[TokenLogprob]:
        """Return the text's tokens with their log-probabilities; a first one has none."""
        if not self.request.score_prompt:
            return []
        scores = [(None, []), *self.request.prompt_scores]
        # a prompt that had no slot before the deadline has no scores
        scores += [(None, [])] * (len(self.request.ids) - len(scores))
        rows = zip(self.offsets, self.request.ids, scores, strict=True)
        tokens = [
            TokenLogprob(offset, Token(self.request, 0, token_id, None, *score))
            for offset, token_id, score in rows
        ]
        return tokens[self.n_hidden :]


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
    n_samples: int  # texts for each prompt
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
        deltas = list(map(self.prepare, deltas))
        self.n_completion_tokens = sum(delta.n_tokens for delta in deltas)
        choices = [self.full_choice(delta) for delta in merge_deltas(deltas)]
        body = {"object": self.full_object, "choices": choices, "usage": self.usage()}
        return to_json(self.envelope | body)

    def events(self, deltas: list[TextDelta]) -> bytes:
        """Return the server-sent events for new deltas; often none."""
        deltas = list(map(self.prepare, deltas))
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

    def prepare(self, delta: TextDelta) -> TextDelta:
        """Return what the response shows of a delta."""
        return delta

    def full_choice(self, delta: TextDelta) -> dict[str, Any]:
        """Return an entry of "choices" in a whole response."""
        raise NotImplementedError

    def chunk_choice(self, delta: TextDelta) -> dict[str, Any]:
        """Return an entry of "choices" in a streamed chunk."""
        raise NotImplementedError


@dataclass
class CompletionResponse(ResponseBuilder):
    """Response of /v1/completions, after an echo of each prompt if there are echoes."""

    echoes: list[Echo] = field(default_factory=list)
    only_echo: bool = False  # max_tokens is 0: the engine's only token is left out

    full_object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def prepare(self, delta: TextDelta) -> TextDelta:
        if not self.echoes:
            return delta
        echo = self.echoes[delta.choice // self.n_samples]
        if self.only_echo:
            delta = delta._replace(text="", logprobs=[], n_tokens=0, finish_reason="length")
        shift = len(echo.text)
        logprobs = [TokenLogprob(offset + shift, token) for offset, token in delta.logprobs]
        if delta.choice in self.started:
            return delta._replace(logprobs=logprobs)
        self.started.add(delta.choice)
        return delta._replace(text=echo.text + delta.text, logprobs=echo.logprobs() + logprobs)

    def full_choice(self, delta: TextDelta) -> dict[str, Any]:
        return {
            "index": delta.choice,
            "text": delta.text,
            "logprobs": self.logprobs(delta.logprobs) if self.with_logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    chunk_choice = full_choice

    def logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, list[Any]]:
        """Return parallel lists; text_offset counts characters of the text."""
        return {
            "tokens": [self.token_text(token.id) for _, token in logprobs],
            "token_logprobs": [finite(token.logprob) for _, token in logprobs],
            "top_logprobs": [self.top_logprobs(token) for _, token in logprobs],
            "text_offset": [offset for offset, _ in logprobs],
        }

    def top_logprobs(self, token: Token) -> dict[str, float | None] | None:
        if token.logprob is None:
            return None
        return {self.token_text(token_id): finite(logprob) for token_id, logprob in token.top}

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
