"""One thread steps the engine; an event loop asks it for texts and gets them in pieces, those of all requests side by side.

    batcher = Batcher(model, tokenizer, threads=2, rows=16, max_queue=128)
    batcher.start(asyncio.get_running_loop())
    call = batcher.ask([Request(ids, params, eos_id)], seconds=300)
    async for pieces in batcher.read(call): ...

The engine, its rows and the texts that grow belong to the thread. What the event loop wants of them goes through the inbox,
between two steps; what the thread has to tell goes back at once where a text begins or ends, else every TELL_SECONDS.
"""

import asyncio
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import torch

from model import Transformer
from pocketlm.inference.engine import Engine, GenerationRequest, Token
from pocketlm.inference.text import TextDecoder
from pocketlm.serving.metrics import ServerMetrics
from pocketlm.tokenizer.base import Tokenizer

TELL_SECONDS = 0.025  # as often is a stream told of what is new, since to tell of a token costs more than a small model's step


class TokenLogprob(NamedTuple):
    """A token of which log-probabilities were asked for."""

    offset: int  # characters of the text before it
    token: Token


class TextDelta(NamedTuple):
    """What is new of one text."""

    index: int  # of the text within its call: prompt * num_samples + sample
    text: str
    told: list[TokenLogprob]
    drawn: int  # tokens, an end token included
    end: str | None  # "stop" or "length" with the last piece


class TooBusy(Exception):
    """There is no room for a call (429), or its turn never came (503). The text is for the client."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class EngineFailed(Exception):
    """A step raised."""


@dataclass(eq=False)
class Call:
    """Requests whose texts go to one reader."""

    requests: list[GenerationRequest]
    stream: bool  # pieces are wanted as they come
    begun: float
    open: int  # texts that have not ended
    waiting: set[int]  # numbers of the requests that no step has taken in
    deadline: asyncio.TimerHandle = field(init=False)
    news: list[TextDelta | Exception] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class TextInProgress:
    """A text as its tokens come, and what is told of them: a token is as soon as a character of it is."""

    def __init__(self, call: Call, index: int, text: TextDecoder):
        self.call, self.index, self.text = call, index, text
        self.held: deque[TokenLogprob] = deque()
        self.shown = 0  # characters
        self.met = False  # has a token

    def push(self, token: Token) -> TextDelta:
        if token.logprob is not None and token.end != "stop":
            self.held.append(TokenLogprob(self.text.length, token))
        new = self.text.push(token)
        return self._piece(new, 1, "stop" if self.text.until.reached is not None else token.end)

    def cut(self) -> TextDelta:
        """The last piece, where no token follows."""
        return self._piece(self.text.rest(), 0, "length")

    def _piece(self, new: str, drawn: int, end: str | None) -> TextDelta:
        self.shown += len(new)
        told = []
        while self.held and self.held[0].offset < self.shown:
            told.append(self.held.popleft())
        return TextDelta(self.index, new, told, drawn, end)


class Batcher:
    """An engine of `rows` rows in a thread that computes with a team of `threads`. All but what begins with _ is for the event loop."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, threads: int, rows: int, max_queue: int
    ):
        self._fresh_engine = partial(Engine, model, rows)
        self._engine = self._fresh_engine()
        self._growing: dict[tuple[GenerationRequest, int], TextInProgress] = {}
        self._news: list[tuple[Call, TextDelta | Exception]] = []  # not told yet
        self._told, self._due = 0.0, math.inf  # when they were told last, and are to be told next
        self._closed, self._threads = False, threads
        self.tokenizer, self.max_queue, self.metrics = tokenizer, max_queue, ServerMetrics()
        self.inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.waiting = 0  # requests that no step has taken in
        self.closing = False
        self.metrics.waiting.set_function(lambda: self.waiting)
        self.metrics.running.set_function(lambda: len(self._engine.rows))

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End what runs, with what there is of it. Safe in a signal handler, and more than once."""
        self.closing = True
        self.inbox.put(self._close)

    def room_for(self, n: int) -> None:
        """Raises TooBusy where n requests cannot wait."""
        if self.closing:
            raise TooBusy(503, "the server is about to stop")
        if self.waiting + n > self.max_queue:
            raise TooBusy(
                429,
                f"{self.waiting} requests are waiting, of {self.max_queue} that may; try again in a second",
            )

    def ask(self, requests: list[GenerationRequest], seconds: float, stream: bool = True) -> Call:
        """Begin the texts behind the prompts; they are cut after so many seconds. Raises TooBusy."""
        self.room_for(len(requests))
        texts = sum(request.params.num_samples for request in requests)
        call = Call(requests, stream, time.perf_counter(), texts, set(range(len(requests))))
        call.deadline = self.loop.call_later(seconds, self.inbox.put, partial(self._cut, call))
        self.waiting += len(requests)
        self.inbox.put(partial(self._begin, call))
        return call

    async def read(self, call: Call) -> AsyncIterator[list[TextDelta]]:
        """What is new, until all texts have ended; a reader that leaves before cancels the call. Raises TooBusy and EngineFailed."""
        try:
            while call.open:
                await call.arrived.wait()
                call.arrived.clear()
                news, call.news = call.news, []
                if failure := next((piece for piece in news if isinstance(piece, Exception)), None):
                    call.open = 0
                    raise failure
                call.open -= sum(piece.end is not None for piece in news)
                yield news
        finally:
            call.deadline.cancel()
            self._forget_waiting(call, call.waiting)
            if call.open:
                call.open = 0
                self.metrics.cancelled.inc()
                self.inbox.put(partial(self._cancel, call))

    def _forget_waiting(self, call: Call, numbers: set[int]) -> None:
        self.waiting -= len(numbers)
        call.waiting = call.waiting - numbers

    def _deliver(self, news: list[tuple[Call, TextDelta | Exception]]) -> None:
        for call, piece in news:
            if isinstance(piece, TextDelta) and call.waiting:
                self._forget_waiting(
                    call, call.waiting & {piece.index // call.requests[0].params.num_samples}
                )
            call.news.append(piece)
            call.arrived.set()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        while not self._closed:
            try:
                if not self._engine.busy:
                    self.inbox.get()()
                while not self.inbox.empty():
                    self.inbox.get()()
                if tokens := self._engine.step():
                    self.metrics.step_rows.observe(len(tokens))
                    self.metrics.completion_tokens.inc(len(tokens))
                    self._due = min(self._due, *map(self._push, tokens))
                    if time.perf_counter() >= self._due:
                        self._tell()
            except Exception as error:  # whatever it is, nobody may wait for ever
                traceback.print_exc()
                self.metrics.failures.inc()
                calls = {growing.call for growing in self._growing.values()}
                self._growing.clear()
                self._engine = self._fresh_engine()
                self._tell([(call, EngineFailed(type(error).__name__)) for call in calls])

    def _tell(self, more: list[tuple[Call, TextDelta | Exception]] | None = None) -> None:
        news, self._news = self._news + (more or []), []
        self._told, self._due = time.perf_counter(), math.inf
        with suppress(RuntimeError):  # the loop has ended, and with it whoever would read
            self.loop.call_soon_threadsafe(self._deliver, news)

    def _begin(self, call: Call) -> None:
        n = call.requests[0].params.num_samples
        for number, request in enumerate(call.requests):
            for sample in range(n):
                text = TextDecoder(self.tokenizer, request.params.stop)
                self._growing[request, sample] = TextInProgress(call, number * n + sample, text)
            self._engine.add(request)

    def _push(self, token: Token) -> float:
        """Note what a token brings. Return when it is to be told: at once where a text begins or ends, soon to a stream."""
        growing = self._growing[token.request, token.sample]
        first = not growing.met
        if first:
            growing.met = True
            if token.sample == 0:
                self.metrics.prompt_tokens.inc(len(token.request.ids))
                self.metrics.first_token.observe(time.perf_counter() - growing.call.begun)
        piece = growing.push(token)
        if piece.end:
            del self._growing[token.request, token.sample]
            self._engine.cancel(
                token.request, token.sample
            )  # of a stop text the engine does not know
        self._news.append((growing.call, piece))
        if first or piece.end:
            return 0.0
        return self._told + TELL_SECONDS if growing.call.stream else math.inf

    def _take(self, call: Call) -> list[TextInProgress]:
        """What is growing of the call, taken out of the engine."""
        found = [key for key, growing in self._growing.items() if growing.call is call]
        for request in call.requests:
            self._engine.cancel(request)
        return [self._growing.pop(key) for key in found]

    def _cancel(self, call: Call) -> None:
        self._take(call)

    def _cut(self, call: Call) -> None:
        never = all(request in self._engine.waiting for request in call.requests)
        left = self._take(call)
        if left and never:
            self._tell([(call, TooBusy(503, "the request's turn did not come in time"))])
        else:
            self._tell([(call, growing.cut()) for growing in left])

    def _close(self) -> None:
        for call in {growing.call for growing in self._growing.values()}:
            self._cut(call)
        self._closed = True
