"""Continuous batching: one thread runs the engine, an event loop submits calls and reads texts.

    batcher = Batcher(model, tokenizer, threads=2, max_slots=16, max_queue=128)
    batcher.start(asyncio.get_running_loop())
    call = batcher.submit([GenerationRequest(ids, params, eos_id)], seconds=300)
    async for deltas in batcher.read(call): ...

A *call* is one client's generation requests; a *delta* is the new text of one of its samples.
The engine, its slots and the texts in progress belong to the engine thread. The event loop puts
functions into the inbox, which the thread runs between two decoding steps. The thread sends
deltas to the event loop at once when a text begins or ends, otherwise every
STREAM_INTERVAL_SECONDS.
"""

import asyncio
import math
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import torch

from model import Transformer
from pocketlm.inference.engine import Engine, GenerationRequest, RequestFailed, Token
from pocketlm.inference.generate import TextDecoder
from pocketlm.serving.errors import EngineFailed, TooBusy
from pocketlm.serving.limits import RETRY_AFTER_SECONDS, STREAM_INTERVAL_SECONDS
from pocketlm.serving.metrics import ServerMetrics
from pocketlm.tokenizer.base import Tokenizer


class TokenLogprob(NamedTuple):
    """A generated token with its log-probabilities and its position in the text."""

    offset: int  # characters of the text before the token
    token: Token


class TextDelta(NamedTuple):
    """The new part of one text."""

    choice: int  # index of the text in its call: prompt * num_samples + sample
    text: str
    logprobs: list[TokenLogprob]
    n_tokens: int  # generated tokens, including an end token
    finish_reason: str | None  # "stop" or "length" in the last delta


Update = TextDelta | EngineFailed | TooBusy  # an exception ends the call


@dataclass(eq=False)
class Call:
    """Generation requests of one client, with the updates that it has not read yet."""

    requests: list[GenerationRequest]
    stream: bool  # the client wants deltas as they come
    client: str
    submitted_at: float
    n_unfinished: int  # texts
    queued: set[int]  # indices of the requests that have not joined the batch
    deadline: asyncio.TimerHandle = field(init=False)
    updates: list[Update] = field(default_factory=list)
    has_updates: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def num_samples(self) -> int:
        """Number of texts for each request; the requests of a call have the same parameters."""
        return self.requests[0].params.num_samples


class Turns:
    """Start-time fair queueing (Goyal, Vin and Cheng 1996): the turns of the clients' requests.

    Each client that waits gets the same share of the tokens: one that asks for many waits behind
    itself, and not in front of others. A request costs the tokens that it may take.
    """

    def __init__(self) -> None:
        self.ends: dict[str, int] = {}  # where the turns of each client end

    def take(self, client: str, request: GenerationRequest, now: int) -> int:
        """Return the turn of a client's next request; `now` is the turn that was admitted last.

        >>> from pocketlm.inference.sampling import SamplingParams
        >>> turns, request = Turns(), GenerationRequest([1] * 9, SamplingParams(max_new_tokens=1))
        >>> [turns.take(client, request, now=5) for client in "aaab"]
        [5, 15, 25, 5]
        """
        params = request.params
        turn = max(now, self.ends.get(client, 0))
        self.ends = {other: end for other, end in self.ends.items() if end > now}
        self.ends[client] = turn + len(request.ids) + params.num_samples * params.max_new_tokens
        return turn


class TextInProgress:
    """Incremental text of one sample with its log-probabilities.

    A token's log-probability is sent together with the token's first visible character.
    """

    def __init__(self, call: Call, choice: int, decoder: TextDecoder):
        self.call, self.choice, self.decoder = call, choice, decoder
        self.pending: deque[TokenLogprob] = deque()
        self.emitted_chars = 0
        self.has_token = False

    def push(self, token: Token) -> TextDelta:
        """Add a generated token; return what it adds to the text."""
        if token.logprob is not None and token.end != "stop":
            self.pending.append(TokenLogprob(self.decoder.length, token))
        text = self.decoder.push(token)
        return self._delta(text, 1, "stop" if self.decoder.stopped else token.end)

    def finish(self) -> TextDelta:
        """Return the last delta of a text that is cut off."""
        return self._delta(self.decoder.flush(), 0, "length")

    def _delta(self, text: str, n_tokens: int, finish_reason: str | None) -> TextDelta:
        self.emitted_chars += len(text)
        logprobs = []
        while self.pending and self.pending[0].offset < self.emitted_chars:
            logprobs.append(self.pending.popleft())
        return TextDelta(self.choice, text, logprobs, n_tokens, finish_reason)


class Batcher:
    """An engine in a thread, shared by many calls.

    `threads` is the number of threads for tensor operations. Attributes and methods whose names
    begin with an underscore belong to the engine thread, the others to the event loop.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, threads: int, max_slots: int, max_queue: int
    ):
        self._new_engine = partial(Engine, model, max_slots)
        self._engine = self._new_engine()
        self._in_progress: dict[tuple[GenerationRequest, int], TextInProgress] = {}
        self._unsent: list[tuple[Call, Update]] = []
        self._sent_at, self._next_send_at = 0.0, math.inf
        self._closed, self._threads, self._turns = False, threads, Turns()
        self.tokenizer, self.max_queue, self.metrics = tokenizer, max_queue, ServerMetrics()
        self.inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.queue: list[Call] = []  # with requests that have not joined the batch
        self.closing = False
        self.metrics.waiting.set_function(lambda: sum(self.waiting_by_client().values()))
        self.metrics.running.set_function(lambda: len(self._engine.running))

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the engine thread."""
        self.loop = loop
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Finish all texts with what they have. Safe in a signal handler, and more than once."""
        self.closing = True
        self.inbox.put(self._close)

    def waiting_by_client(self) -> Counter[str]:
        """Return the number of each client's requests that have not joined the batch."""
        waiting: Counter[str] = Counter()
        for call in list(self.queue):
            waiting[call.client] += len(call.queued)
        return waiting

    def check_capacity(self, n_requests: int, client: str = "") -> list[Call]:
        """Return the calls that make room in a full queue for so many requests of a client.

        They are the newest of clients with at least as many waiting requests as this one then has.
        Raises TooBusy if they do not make enough room.
        """
        if self.closing:
            raise TooBusy(503, "the server is shutting down")
        waiting = self.waiting_by_client()
        total, own = sum(waiting.values()), waiting[client] + n_requests
        excess, leaving = total + n_requests - self.max_queue, []
        for call in reversed(self.queue):
            if excess <= 0:
                break
            n, whole = len(call.queued), len(call.queued) == len(call.requests)
            if whole and call.client != client and waiting[call.client] - n >= own:
                leaving.append(call)
                waiting[call.client] -= n
                excess -= n
        if excess > 0:
            raise TooBusy(
                429,
                f"the queue is full: {total} of at most {self.max_queue} requests are waiting; "
                f"try again in {RETRY_AFTER_SECONDS} s",
            )
        return leaving

    def submit(
        self,
        requests: list[GenerationRequest],
        seconds: float,
        stream: bool = True,
        client: str = "",
    ) -> Call:
        """Queue requests with equal parameters; their texts are cut off after `seconds`.

        Raises TooBusy.
        """
        for other in self.check_capacity(len(requests), client):
            self.remove_from_queue(other, other.queued)
            self.inbox.put(partial(self._give_way, other))
        n_texts, indices = sum(r.params.num_samples for r in requests), set(range(len(requests)))
        call = Call(requests, stream, client, time.perf_counter(), n_texts, indices)
        call.deadline = self.loop.call_later(seconds, self.inbox.put, partial(self._expire, call))
        self.queue.append(call)
        self.inbox.put(partial(self._add_call, call))
        return call

    async def read(self, call: Call) -> AsyncGenerator[list[TextDelta]]:
        """Yield new deltas until all texts have ended.

        Closing the generator before that cancels the call. Raises TooBusy and EngineFailed.
        """
        try:
            while call.n_unfinished:
                await call.has_updates.wait()
                call.has_updates.clear()
                updates, call.updates = call.updates, []
                deltas = []
                for update in updates:
                    if isinstance(update, Exception):
                        call.n_unfinished = 0
                        raise update
                    deltas.append(update)
                call.n_unfinished -= sum(delta.finish_reason is not None for delta in deltas)
                yield deltas
        finally:
            call.deadline.cancel()
            self.remove_from_queue(call, call.queued)
            if call.n_unfinished:
                call.n_unfinished = 0
                self.metrics.cancelled.inc()
                self.inbox.put(partial(self._cancel, call))

    def receive(self, updates: list[tuple[Call, Update]]) -> None:
        """Give updates from the engine thread to the readers of their calls."""
        for call, update in updates:
            if isinstance(update, TextDelta) and call.queued:
                self.remove_from_queue(call, call.queued & {update.choice // call.num_samples})
            call.updates.append(update)
            call.has_updates.set()

    def remove_from_queue(self, call: Call, indices: set[int]) -> None:
        """Note that these requests of a call have joined the batch, or never will."""
        call.queued = call.queued - indices
        if not call.queued and call in self.queue:
            self.queue.remove(call)

    # ---- the engine thread ----

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while not self._closed:
            try:
                if not self._engine.busy:
                    self.inbox.get()()
                while not self.inbox.empty():
                    self.inbox.get()()
                self._step()
            except Exception as error:  # of any kind: no client may wait forever
                calls = {text.call for text in self._in_progress.values()}
                self._in_progress.clear()
                self._engine, self._turns = self._new_engine(), Turns()
                self._fail(calls, error)

    def _step(self) -> None:
        """Take a decoding step. A failure of one call, whatever it is, ends only that call."""
        try:
            tokens = self._engine.step()
        except RequestFailed as error:
            texts = self._in_progress.items()
            calls = {text.call for (request, _), text in texts if request in error.requests}
            for call in calls:
                self._remove(call)
            self._fail(calls, error)
            return
        if tokens:
            self.metrics.step_rows.observe(len(tokens))
            self.metrics.completion_tokens.inc(len(tokens))
        for token in tokens:
            text = self._in_progress.get((token.request, token.sample))
            if text is None:  # another sample of its call has failed in this step
                continue
            try:
                self._next_send_at = min(self._next_send_at, self._add_token(text, token))
            except Exception as error:
                self._remove(text.call)
                self._fail({text.call}, error)
        if time.perf_counter() >= self._next_send_at:
            self._send()

    def _fail(self, calls: set[Call], error: Exception) -> None:
        traceback.print_exception(error)
        self.metrics.failures.inc()
        self._send([(call, EngineFailed(type(error).__name__)) for call in calls])

    def _send(self, more: list[tuple[Call, Update]] | None = None) -> None:
        updates, self._unsent = self._unsent + (more or []), []
        self._sent_at, self._next_send_at = time.perf_counter(), math.inf
        with suppress(RuntimeError):  # the event loop is closed, so nobody reads
            self.loop.call_soon_threadsafe(self.receive, updates)

    def _add_call(self, call: Call) -> None:
        try:
            for number, request in enumerate(call.requests):
                for sample in range(call.num_samples):
                    decoder = TextDecoder(self.tokenizer, request.params.stop, request.ids)
                    choice = number * call.num_samples + sample
                    self._in_progress[request, sample] = TextInProgress(call, choice, decoder)
                request.turn = self._turns.take(call.client, request, self._engine.turn)
                self._engine.add(request)
        except Exception as error:
            self._remove(call)
            self._fail({call}, error)

    def _add_token(self, text: TextInProgress, token: Token) -> float:
        """Store a token's delta; return the time by which it should be sent.

        The first and the last delta of a text are sent at once, and the others of a stream at
        the next interval. A whole response needs no update before its end.
        """
        is_first = not text.has_token
        if is_first:
            text.has_token = True
            if token.sample == 0:
                self.metrics.prompt_tokens.inc(len(token.request.ids))
                self.metrics.first_token.observe(time.perf_counter() - text.call.submitted_at)
        delta = text.push(token)
        if delta.finish_reason:
            del self._in_progress[token.request, token.sample]
            # The engine does not know stop strings, so this sample may still be running there.
            self._engine.cancel(token.request, token.sample)
        self._unsent.append((text.call, delta))
        if is_first or delta.finish_reason:
            return 0.0
        return self._sent_at + STREAM_INTERVAL_SECONDS if text.call.stream else math.inf

    def _remove(self, call: Call) -> list[TextInProgress]:
        """Remove a call from the engine; return its unfinished texts."""
        keys = [key for key, text in self._in_progress.items() if text.call is call]
        for request in call.requests:
            self._engine.cancel(request)
        return [self._in_progress.pop(key) for key in keys]

    def _cancel(self, call: Call) -> None:
        self._remove(call)

    def _waits(self, call: Call) -> bool:
        """Return whether none of a call's requests has joined the batch."""
        return all(request in self._engine.waiting for request in call.requests)

    def _give_way(self, call: Call) -> None:
        """End a call, unless it has just joined the batch, for one of another client."""
        if self._waits(call) and self._remove(call):
            message = (
                "the queue is full, and gave this place to a client with fewer requests; "
                f"try again in {RETRY_AFTER_SECONDS} s"
            )
            self._send([(call, TooBusy(429, message))])

    def _expire(self, call: Call) -> None:
        """End a call at its deadline, or at shutdown."""
        never_joined = self._waits(call)
        unfinished = self._remove(call)
        if unfinished and never_joined:
            self._send([(call, TooBusy(503, "the request got no slot before its deadline"))])
        else:
            self._send([(call, text.finish()) for text in unfinished])

    def _close(self) -> None:
        for call in {text.call for text in self._in_progress.values()}:
            self._expire(call)
        self._closed = True
