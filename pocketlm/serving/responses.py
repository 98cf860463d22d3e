"""What answers look like."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from pocketlm.serving.batcher import Batcher, Call, EngineFailed, TextDelta, TokenLogprob, TooBusy
from pocketlm.serving.limits import LEAST_LOGPROB
from pocketlm.serving.requests import ApiError, to_json
from pocketlm.tokenizer.base import BEGIN_OF_TEXT, END_OF_TEXT, Tokenizer

# ---- answers ---------------------------------------------------------------------------------------------------------


class Spelling:
    """Tokens as texts. Kept, since the same few are told of again and again."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.of = cache(self._of)

    def _of(self, i: int) -> tuple[str, list[int] | None]:
        """A token's text and its bytes; the bytes themselves, written out, where they are no whole characters."""
        around = {self.tokenizer.bos_id: BEGIN_OF_TEXT, self.tokenizer.eos_id: END_OF_TEXT}
        if i in around:
            return around[i], None
        spelt = self.tokenizer.spell(i)
        try:
            return spelt.decode(), list(spelt)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt), list(spelt)


def finite(nats: float) -> float:
    """A number that JSON has, as it has no infinity."""
    return max(nats, LEAST_LOGPROB) if nats == nats else LEAST_LOGPROB


def merged(news: Iterable[TextDelta]) -> list[TextDelta]:
    """One piece for each text."""
    found: dict[int, TextDelta] = {}
    for piece in news:
        old = found.get(piece.index)
        found[piece.index] = piece if old is None else TextDelta(
            piece.index, old.text + piece.text, old.told + piece.told, old.drawn + piece.drawn, piece.end
        )  # fmt: skip
    return [found[index] for index in sorted(found)]


@dataclass
class ResponseBuilder:
    """One answer in the making, whole or in chunks."""

    model: str
    spelling: Spelling
    n_prompt_tokens: int
    told: bool  # log-probabilities are asked for
    usage_told: bool = False  # at the end of a stream

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    id_prefix: ClassVar[str]

    def __post_init__(self) -> None:
        self.head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": "",
            "created": int(time.time()),
            "model": self.model,
        }
        self.opened: set[int] = set()  # texts of which there was a chunk
        self.said: set[int] = set()  # texts of which there was more than white space
        self.n_drawn = 0

    def whole(self, news: list[TextDelta]) -> bytes:
        choices = [self.whole_choice(piece) for piece in merged(news)]
        self.n_drawn = sum(piece.drawn for piece in news)
        return to_json(
            self.head | {"object": self.whole_object, "choices": choices, "usage": self.usage()}
        )

    def chunks(self, news: list[TextDelta]) -> bytes:
        """Server-sent events of what is new; often none."""
        self.n_drawn += sum(piece.drawn for piece in news)
        return b"".join(
            self.event([self.chunk_choice(piece)], None)
            for piece in merged(news)
            if piece.text or piece.told or piece.end
        )

    def last(self) -> bytes:
        return (self.event([], self.usage()) if self.usage_told else b"") + b"data: [DONE]\n\n"

    def event(self, choices: list[dict], usage: dict | None) -> bytes:
        body = (
            self.head
            | {"object": self.chunk_object, "choices": choices}
            | ({"usage": usage} if self.usage_told else {})
        )
        return b"data: " + to_json(body) + b"\n\n"

    def usage(self) -> dict[str, int]:
        total = self.n_prompt_tokens + self.n_drawn
        return {
            "prompt_tokens": self.n_prompt_tokens,
            "completion_tokens": self.n_drawn,
            "total_tokens": total,
        }

    def whole_choice(self, piece: TextDelta) -> dict[str, Any]:
        raise NotImplementedError

    def chunk_choice(self, piece: TextDelta) -> dict[str, Any]:
        raise NotImplementedError


class CompletionResponse(ResponseBuilder):
    whole_object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def whole_choice(self, piece: TextDelta) -> dict[str, Any]:
        logprobs = self.logprobs(piece.told) if self.told else None
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.end,
        }

    chunk_choice = whole_choice

    def logprobs(self, told: list[TokenLogprob]) -> dict[str, list]:
        """text_offset counts the characters of the completion before the token."""
        name = self.spelling.of
        return {
            "tokens": [name(token.id)[0] for _, token in told],
            "token_logprobs": [finite(token.logprob) for _, token in told],
            "top_logprobs": [
                {name(i)[0]: finite(nats) for i, nats in token.top} for _, token in told
            ],
            "text_offset": [offset for offset, _ in told],
        }


class ChatResponse(ResponseBuilder):
    """White space with which an answer begins belongs to the form of the conversation, and is left out."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def whole_choice(self, piece: TextDelta) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text.lstrip()}
        return {
            "index": piece.index,
            "message": message,
            "logprobs": self.logprobs(piece.told),
            "finish_reason": piece.end,
        }

    def chunk_choice(self, piece: TextDelta) -> dict[str, Any]:
        text = piece.text if piece.index in self.said else piece.text.lstrip()
        opening = {} if piece.index in self.opened else {"role": "assistant"}
        self.opened.add(piece.index)
        if text:
            self.said.add(piece.index)
        return {
            "index": piece.index,
            "delta": opening | {"content": text},
            "logprobs": self.logprobs(piece.told),
            "finish_reason": piece.end,
        }

    def logprobs(self, told: list[TokenLogprob]) -> dict[str, list] | None:
        def entry(i: int, nats: float) -> dict[str, Any]:
            text, spelt = self.spelling.of(i)
            return {"token": text, "logprob": finite(nats), "bytes": spelt}

        if not self.told:
            return None
        content = [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*each) for each in token.top]}
            for _, token in told
        ]
        return {"content": content, "refusal": None}


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


async def respond(batcher: Batcher, call: Call, answer: ResponseBuilder, stream: bool) -> Response:
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
