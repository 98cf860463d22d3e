"""Continuous batching: requests are admitted to a running batch and evicted from it between steps.

    engine = Engine(model, max_slots=16)
    engine.add(GenerationRequest(ids, SamplingParams(seed=7), eos_id=tokenizer.eos_id))
    while engine.busy:
        for token in engine.step():
            ...

The engine knows token ids only. Its words:

sequence: one sample of a request, its prompt and the tokens drawn so far.
slot: the part of the KV cache of one sequence; the running sequences have the first slots.
prefill: running the model over a prompt to fill a slot, all of it but the last token.
decoding step: the model takes in the last token of every running sequence, and draws the next.

A text longer than the context keeps its last tokens: if a slot is full, its sequence continues
from the last half of the context, which is prefilled again.

A step takes a bounded time whatever a request asks, and a request that fails ends no other.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from model import Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import FieldError, UserError
from pocketlm.inference.backend import Chunk, DecodeBackend, SlotCache
from pocketlm.inference.native import select_backend
from pocketlm.inference.sampling import NO_TOKEN, TokenScore, log_probabilities, sample

PREFILL_BUDGET = 512  # prompt tokens that are prefilled between two decoding steps at most


# ---- requests ----


@dataclass(eq=False)
class GenerationRequest:
    """A prompt to continue, params.num_samples times."""

    ids: list[int]
    params: SamplingParams
    eos_id: int | None = None  # ends a sequence, as params.stop_ids do
    top_logprobs: int | None = None  # top log-probabilities to return per token; None: disabled
    score_prompt: bool = False  # fill `prompt_scores` before the first token; needs top_logprobs
    prompt_scores: list[TokenScore] = field(default_factory=list)  # of the prompt's later tokens
    turn: int = 0  # place in the queue: of waiting requests, those of the lowest turn go first

    @cached_property
    def draw_params(self) -> SamplingParams:
        """The parameters that affect a single draw; equal ones are sampled as one batch."""
        return replace(
            self.params, max_new_tokens=1, stop=(), stop_ids=(), seed=None, num_samples=1
        )


class RequestFailed(UserError):
    """The model's logits for some requests are NaN, which ends them; the engine goes on."""

    def __init__(self, requests: set[GenerationRequest]):
        super().__init__(
            "the model's logits are NaN: its weights are broken; use another checkpoint"
        )
        self.requests = requests


def validate_request(request: GenerationRequest, vocab_size: int) -> None:
    """Raise ValueError if the request does not suit a vocabulary of this size.

    It is a FieldError, with the name of the parameter, unless the prompt is at fault.
    """
    params = request.params
    if not request.ids:
        raise ValueError("a prompt needs at least one token")
    if params.top_k > vocab_size:
        raise FieldError("top_k", f"is {params.top_k}; the vocabulary has {vocab_size:,} tokens")
    biased = [token for token, _ in params.logit_bias]
    for name, ids in (("logit_bias", biased), ("stop_ids", params.stop_ids)):
        if reason := unknown_token(ids, vocab_size):
            raise FieldError(name, reason)
    if reason := unknown_token(request.ids, vocab_size):
        raise ValueError(f"the prompt {reason}")


def unknown_token(ids: Iterable[int], vocab_size: int) -> str | None:
    """Describe the first id outside the vocabulary, if there is one."""
    for token in ids:
        if not 0 <= token < vocab_size:
            return f"has the id {token}; the vocabulary has {vocab_size:,} tokens"
    return None


class Token(NamedTuple):
    """A token that a step has drawn for one sample of a request."""

    request: GenerationRequest
    sample: int  # from 0 to params.num_samples - 1
    id: int
    end: str | None  # "stop": the text ends before this token (or NO_TOKEN); "length": after it
    logprob: float | None = None  # in nats, under the model's own logits before any filter
    top: list[tuple[int, float]] = []  # the most likely ids and their log-probabilities


@dataclass(eq=False)
class Sequence:
    """One sample in progress."""

    request: GenerationRequest
    sample: int
    ids: list[int]  # the prompt and the tokens drawn
    generator: torch.Generator
    n_drawn: int = 0


def new_sequence(request: GenerationRequest, sample: int) -> Sequence:
    """Return a sequence with its own random stream, seeded with seed + sample."""
    generator, seed = torch.Generator(), request.params.seed
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed + sample) % 2**63)
    return Sequence(request, sample, list(request.ids), generator)


# ---- the engine ----


class Engine:
    """Generation of up to `max_slots` sequences at a time, each in a context of `max_len` tokens.

    max_len: the model's context if None or longer.
    backend: the native backend if None and it is available, else torch.
    """

    def __init__(
        self,
        model: Transformer,
        max_slots: int,
        max_len: int | None = None,
        backend: DecodeBackend | None = None,
    ):
        assert model.config.vocab_size
        self.vocab_size, self.max_slots = model.config.vocab_size, max_slots
        self.context = min(max_len or model.max_seq_len, model.max_seq_len)
        self.cache = SlotCache(
            model.config, max_slots, self.context, dtype=model.dtype, device=model.device
        )
        self.backend: DecodeBackend = backend or select_backend(model)
        self.waiting: deque[GenerationRequest] = deque()  # by turn
        self.turn = 0  # of the request that was admitted last
        self.running: list[Sequence] = []  # the sequence of slot b is running[b]
        # One request is prefilled at a time, into the slot after the running ones
        self.prefilling: list[Sequence] = []  # its samples, which share the prefill
        self.unread_prompt: list[int] = []  # prompt tokens not prefilled yet

    @property
    def busy(self) -> bool:
        return bool(self.running or self.prefilling or self.waiting)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request, which is admitted at its turn, once there are slots for all its samples.

        Raises ValueError for an invalid request or one with more samples than slots.
        """
        validate_request(request, self.vocab_size)
        num_samples = request.params.num_samples
        if num_samples > self.max_slots:
            raise FieldError(
                "num_samples", f"is {num_samples}; the engine has {self.max_slots} slots"
            )
        place = bisect_right(self.waiting, request.turn, key=lambda other: other.turn)
        self.waiting.insert(place, request)

    def cancel(self, request: GenerationRequest, sample: int | None = None) -> None:
        """Drop a request, or one of its samples; do nothing if it has ended already."""

        def cancelled(sequence: Sequence) -> bool:
            return sequence.request is request and sample in (None, sequence.sample)

        if request in self.waiting:
            self.waiting.remove(request)
        self.prefilling = [each for each in self.prefilling if not cancelled(each)]
        for sequence in [each for each in self.running if cancelled(each)]:
            self._evict(sequence)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Admit requests, then take one decoding step; return a token for every sequence.

        At most PREFILL_BUDGET prompt tokens are prefilled, so that running sequences never wait
        long. Raises RequestFailed; the next step is then that of the remaining requests.
        """
        self.admit()
        self._shift_full_slots()
        if not self.running:
            return []
        last_tokens = [sequence.ids[-1] for sequence in self.running]
        logits = self.backend.decode(self.cache, last_tokens).cpu()
        self._fail_if_nan(logits)
        tokens = self._sample(logits)
        for token, sequence in zip(tokens, list(self.running), strict=True):
            sequence.ids.append(token.id)
            sequence.n_drawn += 1
            if token.end:
                self._evict(sequence)
        return tokens

    def _fail_if_nan(self, logits: Tensor) -> None:
        """Drop the requests whose logits are NaN, of which any token would be drawn.

        Raises RequestFailed, after which the others take this decoding step again.
        """
        broken = logits[:, 0].isnan()  # a row is all NaN or not at all
        if not broken.any():
            return
        self.cache.lengths[: len(self.running)] -= 1
        failed = {self.running[slot].request for slot in broken.nonzero()[:, 0].tolist()}
        for request in failed:
            self.cancel(request)
        raise RequestFailed(failed)

    @torch.inference_mode()
    def admit(self) -> None:
        """Admit waiting requests, first come first served in each turn, and prefill their prompts.

        A prompt is prefilled once for all its samples, in chunks that do not depend on other
        requests, since the text must not depend on them.
        """
        chunks: list[Chunk] = []
        n_tokens = 0
        admitted: list[range] = []  # slots of each request that starts to run
        while self.prefilling or self._begin_prefill():
            slot, ids = len(self.running), self.unread_prompt[:PREFILL_BUDGET]
            n_tokens += len(ids)
            if chunks and n_tokens > PREFILL_BUDGET:
                break
            chunks.append((slot, ids))
            self.unread_prompt = self.unread_prompt[PREFILL_BUDGET:]
            if self.unread_prompt:
                break
            self.running += self.prefilling
            self.prefilling = []
            admitted.append(range(slot, len(self.running)))
        self._prefill(chunks)
        for first, *others in admitted:
            for slot in others:
                self.cache.copy_slot(first, slot)

    def _prefill(self, chunks: list[Chunk]) -> None:
        """Append prompt tokens to slots; note the log-probabilities that were requested."""
        sequences = self.running + self.prefilling
        scored = [chunk for chunk in chunks if sequences[chunk[0]].request.score_prompt]
        self.backend.prefill(self.cache, [chunk for chunk in chunks if chunk not in scored])
        for slot, ids in scored:
            request = sequences[slot].request
            assert request.top_logprobs is not None
            read = max(0, len(request.ids) - self.context) + int(self.cache.lengths[slot])
            for logits in self.backend.prefill_logits(self.cache, slot, ids):
                next_ids = torch.tensor(request.ids[read + 1 : read + 1 + len(logits)])
                request.prompt_scores += log_probabilities(
                    logits.cpu(), next_ids, request.top_logprobs
                )
                read += len(logits)

    def _begin_prefill(self) -> bool:
        """Start the prefill of the first waiting request; return False if it has to wait."""
        if not self.waiting:
            return False
        num_samples = self.waiting[0].params.num_samples
        if len(self.running) + num_samples > self.max_slots:
            return False
        request = self.waiting.popleft()
        self.turn = request.turn
        self.prefilling = [new_sequence(request, sample) for sample in range(num_samples)]
        self.unread_prompt = request.ids[-self.context : -1]
        self.cache.lengths[len(self.running)] = 0
        return True

    def _shift_full_slots(self) -> None:
        """Refill each full slot with the last half of its context."""
        lengths = self.cache.lengths[: len(self.running)].tolist()
        full = [slot for slot, length in enumerate(lengths) if length == self.context]
        if full:
            self.cache.lengths[full] = 0
            half = max(1, self.context // 2)
            self.backend.prefill(
                self.cache, [(slot, self.running[slot].ids[-half:-1]) for slot in full]
            )

    def _evict(self, sequence: Sequence) -> None:
        """Free a slot: the last running sequence moves into it, and the prefill moves up by one."""
        slot, last = self.running.index(sequence), len(self.running) - 1
        if slot < last:
            self.cache.copy_slot(last, slot)
            self.running[slot] = self.running[last]
        self.running.pop()
        if self.prefilling:
            self.cache.copy_slot(last + 1, last)

    def _sample(self, logits: Tensor) -> list[Token]:
        """Draw the next token of every sequence; sequences with equal parameters share a batch."""
        batches: dict[SamplingParams, list[int]] = {}
        for slot, sequence in enumerate(self.running):
            batches.setdefault(sequence.request.draw_params, []).append(slot)
        drawn = torch.zeros(len(self.running), dtype=torch.long)
        for params, slots in batches.items():
            contexts = [self.running[slot].ids for slot in slots]
            n_drawn = [self.running[slot].n_drawn for slot in slots]
            draws = torch.cat([draw(self.running[slot].generator) for slot in slots])
            rows = logits if len(slots) == len(logits) else logits[slots]
            drawn[slots] = sample(rows, params, contexts, draws, self.backend.sample, n_drawn)
        tokens = []
        for slot, (sequence, token) in enumerate(zip(self.running, drawn.tolist(), strict=True)):
            request, end = sequence.request, end_reason(sequence, token)
            if request.top_logprobs is None or token == NO_TOKEN:
                tokens.append(Token(request, sequence.sample, token, end))
            else:
                row = slice(slot, slot + 1)
                [(logprob, top)] = log_probabilities(logits[row], drawn[row], request.top_logprobs)
                tokens.append(Token(request, sequence.sample, token, end, logprob, top))
        return tokens


def draw(generator: torch.Generator) -> Tensor:
    """Return the next number (1,) of a random stream, in [0, 1)."""
    return torch.rand(1, dtype=torch.float64, generator=generator)


def end_reason(sequence: Sequence, token: int) -> str | None:
    """Return `Token.end` for the next token of a sequence."""
    request = sequence.request
    if token in (NO_TOKEN, request.eos_id) or token in request.params.stop_ids:
        return "stop"
    if sequence.n_drawn + 1 == request.params.max_new_tokens:
        return "length"
    return None
