"""Many requests over one key/value cache: they join and leave a running batch, and every step gives each one a token.

    engine = Engine(model, max_rows=16)
    engine.add(Request(ids, SamplingParams(seed=7), eos_id=tokenizer.eos_id))
    while engine.busy:
        for token in engine.step(): ...

The engine knows token ids only. A request has a row of the cache for each of its samples; rows in use are always the first.
What is cached of a row is all but its last token, which the next step takes in. A text longer than the context keeps its
last tokens: when a row is full, it goes on from the last half of the context.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from mmap import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from model import KVCache, ModelConfig, Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import FieldError, UserError
from pocketlm.inference.native import NativeStep, NativeUnavailable
from pocketlm.inference.sampling import Sampler, log_probabilities, sample

PREFILL_BUDGET = 512  # tokens of prompts that are read between two steps


NATIVE_PREFILL_MAX = 128  # tokens of a prompt up to which C reads them faster than torch


@dataclass(eq=False)
class GenerationRequest:
    """A prompt to continue, params.num_samples times."""

    ids: list[int]
    params: SamplingParams
    eos_id: int | None = None  # ends a row, as params.stop_ids do
    top_logprobs: int | None = (
        None  # tell log-probabilities: of the token drawn and of so many of the likeliest
    )

    @cached_property
    def distribution(self) -> SamplingParams:
        """What of the parameters decides how a token is drawn; requests in which it is equal are drawn together."""
        return replace(
            self.params, max_new_tokens=1, stop=(), stop_ids=(), seed=None, num_samples=1
        )


def first_beyond(ids: Iterable[int], vocab_size: int) -> str | None:
    """Say which id is the first that the vocabulary does not have, if one is."""
    beyond = next((i for i in ids if not 0 <= i < vocab_size), None)
    return (
        None
        if beyond is None
        else f"has the id {beyond}, and the vocabulary {vocab_size:,} entries"
    )


def validate_request(request: GenerationRequest, vocab_size: int) -> None:
    """Raise ValueError, by the field's name, for what a vocabulary of this size has no place for."""
    params = request.params
    if not request.ids:
        raise ValueError("a prompt needs a token")
    if params.top_k > vocab_size:
        raise FieldError(
            "top_k", f"is {params.top_k}, and the vocabulary has {vocab_size:,} entries"
        )
    for name, ids in (
        ("logit_bias", [i for i, _ in params.logit_bias]),
        ("stop_ids", params.stop_ids),
    ):
        if beyond := first_beyond(ids, vocab_size):
            raise FieldError(name, beyond)
    if beyond := first_beyond(request.ids, vocab_size):
        raise ValueError(f"the prompt {beyond}")


class Token(NamedTuple):
    """What a step gave to one sample of a request."""

    request: GenerationRequest
    sample: int  # from 0 to params.num_samples - 1
    id: int
    end: (
        str | None
    )  # "stop": this is an end token and no text; "length": the last of max_new_tokens
    logprob: float | None = (
        None  # nats, by the model itself: before penalties, temperature and the rest
    )
    top: list[tuple[int, float]] = []  # the likeliest ids and their nats


@dataclass(eq=False)
class Sequence:
    """One sample as it grows."""

    request: GenerationRequest
    sample: int
    ids: list[int]  # the prompt and what was drawn
    generator: torch.Generator
    n_drawn: int = 0


class SlotCache(KVCache):
    """A cache whose rows have lengths of their own. It takes one token a row, of the first rows; `row` is for a prompt.

    lengths: (B,) on the CPU; of row b the first lengths[b] positions are filled.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(config, batch_size, max_len, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.long)

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """On a CPU the kernel's own, which take memory as they are written to: most rows never come to the end of their context."""
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        return torch.frombuffer(mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(
            shape
        )

    def begin(self, n: int) -> Tensor:
        """Make ready for a token in each of the first n rows; return their positions (n, 1)."""
        self.places = self.lengths[:n].to(self.keys.device)  # (n,)
        self.length = int(self.lengths[:n].max())
        return self.places[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n, end = k.size(0), self.length + 1
        every = torch.arange(n, device=k.device)
        self.keys[layer, every, :, self.places] = k[:, :, 0]
        self.values[layer, every, :, self.places] = v[:, :, 0]
        return self.keys[layer, :n, :, :end], self.values[layer, :n, :, :end]

    def mask(self, T: int) -> Tensor:
        """(n, 1, 1, S): each row attends to itself and what it has."""
        return (torch.arange(self.length + T, device=self.keys.device) <= self.places[:, None])[
            :, None, None
        ]

    def advance(self, T: int) -> None:
        self.lengths[: len(self.places)] += T

    def row(self, b: int) -> KVCache:
        """Row b as a cache of its own, over the same memory."""
        row = object.__new__(KVCache)
        row.keys, row.values, row.length = (
            self.keys[:, b : b + 1],
            self.values[:, b : b + 1],
            int(self.lengths[b]),
        )
        return row

    def copy(self, source: int, target: int) -> None:
        """Make one row what another is."""
        length = int(self.lengths[source])
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
        self.lengths[target] = length


def new_generator(request: GenerationRequest, sample: int) -> torch.Generator:
    """A sample's own source of draws: that of the next seed for each."""
    generator, seed = torch.Generator(), request.params.seed
    generator.seed() if seed is None else generator.manual_seed((seed + sample) % 2**63)
    return generator


def decode_in_torch(model: Transformer, cache: SlotCache, tokens: list[int]) -> Tensor:
    """Take a token into each of the first rows of the cache; logits (B, V) of what follows."""
    positions = cache.begin(len(tokens))
    ids = torch.tensor(tokens, device=positions.device)[:, None]
    return model.logits(model.hidden(ids, positions=positions, cache=cache)[:, 0])


class Engine:
    """Rows of requests over one cache, for up to `max_rows` samples of up to `max_len` tokens of context each."""

    def __init__(self, model: Transformer, max_rows: int, max_len: int | None = None):
        self.model, self.context = (
            model,
            min(max_len or model.config.max_seq_len, model.config.max_seq_len),
        )
        self.cache = SlotCache(
            model.config, max_rows, self.context, dtype=model.dtype, device=model.device
        )
        self.take: Callable[[Transformer, SlotCache, list[int]], Tensor] = decode_in_torch
        self.choose: Sampler | None = None
        self.why_torch = ""  # the reason, where it is not C
        try:
            self.take = NativeStep(model)
            self.choose = self.take.choose
        except NativeUnavailable as reason:
            self.why_torch = str(reason)
        self.rows: list[Sequence] = []  # as they are in the cache
        self.joining: list[
            Sequence
        ] = []  # of the request whose prompt is being read, into the row of the cache behind those
        self.unread: list[int] = []  # of that prompt
        self.waiting: deque[GenerationRequest] = deque()
        self.max_rows = max_rows

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.joining or self.waiting)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request; it joins as soon as there are rows for all its samples. Raises ValueError for one that cannot be."""
        validate_request(request, self.model.config.vocab_size)
        if request.params.num_samples > self.max_rows:
            raise FieldError(
                "num_samples",
                f"is {request.params.num_samples}, and there is room for {self.max_rows}",
            )
        self.waiting.append(request)

    def cancel(self, request: GenerationRequest, sample: int | None = None) -> None:
        """Forget a request, or one sample of it; what is not there is left alone."""
        if request in self.waiting:
            self.waiting.remove(request)
        self.joining = [
            row
            for row in self.joining
            if row.request is not request or sample not in (None, row.sample)
        ]
        for row in [
            row for row in self.rows if row.request is request and sample in (None, row.sample)
        ]:
            self._leave(row)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """A token for every row. PIECE tokens of prompts are read in a step at most, so that the others do not wait for long."""
        self.join()
        full = [
            b
            for b, length in enumerate(self.cache.lengths[: len(self.rows)].tolist())
            if length == self.context
        ]
        if full:
            self.cache.lengths[full] = 0
            self._read([(b, self.rows[b].ids[-max(1, self.context // 2) : -1]) for b in full])
        if not self.rows:
            return []
        logits = self.take(self.model, self.cache, [row.ids[-1] for row in self.rows]).cpu()
        if logits[:, 0].isnan().any():  # then all of the row are, and any token would do
            raise UserError(
                "the model's logits are not numbers: its weights are broken; take another checkpoint"
            )
        tokens = self._sample(logits)
        for token, row in zip(tokens, list(self.rows), strict=True):
            row.ids.append(token.id)
            row.n_drawn += 1
            if token.end:
                self._leave(row)
        return tokens

    @torch.inference_mode()
    def join(self) -> None:
        """Let the waiting in, in their order, while there is room. A prompt is read once for all its samples, and cut at the same places
        whoever else joins, as a text must not depend on that.
        """
        pieces: list[tuple[int, list[int]]] = []  # rows, and what is read into them
        joined: list[range] = []
        while self.joining or self._admit():
            b, piece = len(self.rows), self.unread[:PREFILL_BUDGET]
            if pieces and sum(len(ids) for _, ids in pieces) + len(piece) > PREFILL_BUDGET:
                break
            pieces.append((b, piece))
            self.unread = self.unread[PREFILL_BUDGET:]
            if self.unread:
                break
            self.rows += self.joining
            self.joining = []
            joined.append(range(b, len(self.rows)))
        self._read(pieces)
        for first, *others in joined:
            for b in others:
                self.cache.copy(first, b)

    def _admit(self) -> bool:
        """Whether the first of the waiting has room; then it is joining."""
        if not self.waiting or len(self.rows) + self.waiting[0].params.num_samples > self.max_rows:
            return False
        request = self.waiting.popleft()
        self.joining = [
            Sequence(request, sample, list(request.ids), new_generator(request, sample))
            for sample in range(request.params.num_samples)
        ]
        self.unread = request.ids[-self.context : -1]
        self.cache.lengths[len(self.rows)] = 0
        return True

    def _read(self, pieces: list[tuple[int, list[int]]]) -> None:
        """Take ids into rows, behind what those have: the short ones all at once."""
        short = []
        for b, ids in pieces:
            if len(ids) <= NATIVE_PREFILL_MAX and isinstance(self.take, NativeStep):
                short.append((b, ids))
            elif ids:
                self.model.hidden(
                    torch.tensor([ids], device=self.cache.keys.device), cache=self.cache.row(b)
                )
        if short:
            self.take.read(self.cache, short)
        for b, ids in pieces:
            self.cache.lengths[b] += len(ids)

    def _leave(self, row: Sequence) -> None:
        """The last row takes the place, and what is read of the next one the last place."""
        b, last = self.rows.index(row), len(self.rows) - 1
        if b < last:
            self.cache.copy(last, b)
            self.rows[b] = self.rows[last]
        self.rows.pop()
        if self.joining:
            self.cache.copy(last + 1, last)

    def _sample(self, logits: Tensor) -> list[Token]:
        """The next token of every row, of those with the same parameters at once."""
        alike: dict[SamplingParams, list[int]] = {}
        for b, row in enumerate(self.rows):
            alike.setdefault(row.request.distribution, []).append(b)
        drawn = torch.zeros(len(self.rows), dtype=torch.long)
        for params, members in alike.items():
            chosen = [self.rows[b] for b in members]
            draws = torch.cat(
                [torch.rand(1, dtype=torch.float64, generator=row.generator) for row in chosen]
            )
            mine = logits if len(members) == len(logits) else logits[members]
            drawn[members] = sample(mine, params, [row.ids for row in chosen], draws, self.choose)
        tokens = []
        for b, (row, i) in enumerate(zip(self.rows, drawn.tolist(), strict=True)):
            request = row.request
            over = i == request.eos_id or i in request.params.stop_ids
            end = (
                "stop"
                if over
                else "length"
                if row.n_drawn + 1 == request.params.max_new_tokens
                else None
            )
            told = (
                ()
                if request.top_logprobs is None
                else log_probabilities(logits[b : b + 1], drawn[b : b + 1], request.top_logprobs)[0]
            )
            tokens.append(Token(request, row.sample, i, end, *told))
        return tokens
