"""Decode backends: who computes what the engine needs of a model, compiled C or torch.

    engine = Engine(model, max_slots=16)                               # C if possible, else torch
    engine = Engine(model, max_slots=16, backend=TorchBackend(model))  # torch

The native backend (native.py) is several times faster than torch on a small model, but needs a CPU
and a C compiler. Its logits differ from torch's by rounding only: sums run in another order.
"""

import math
from collections.abc import Iterator
from mmap import mmap
from typing import Protocol

import torch
from torch import Tensor

from model import KVCache, ModelConfig, Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.inference.sampling import sample_in_torch
from pocketlm.model.quantization import without_bfloat16_products


class SlotCache(KVCache):
    """A KV cache of `n_slots` slots with lengths of their own.

    A decoding step appends one token to each of the first slots; `slot` is for a prefill.

    lengths: (n_slots,) on the CPU; the first lengths[b] positions of slot b are filled.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_slots: int,
        max_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(config, n_slots, max_len, dtype=dtype, device=device)
        self.lengths = torch.zeros(n_slots, dtype=torch.long)

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return zeros; on a CPU they are anonymous pages that take memory only when written.

        Most sequences never fill their slot, so most of a large cache is never allocated.
        """
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        pages = mmap(-1, math.prod(shape) * dtype.itemsize)
        return torch.frombuffer(pages, dtype=dtype).view(shape)

    # ---- a decoding step: one token for each of the first slots ----

    def begin_step(self, n: int) -> Tensor:
        """Prepare for one token in each of the first n slots; return their positions (n, 1)."""
        self.positions = self.lengths[:n].to(self.keys.device)  # (n,)
        self.length = int(self.lengths[:n].max())
        return self.positions[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n, end = k.size(0), self.length + 1
        slots = torch.arange(n, device=k.device)
        self.keys[layer, slots, :, self.positions] = k[:, :, 0].to(self.keys)
        self.values[layer, slots, :, self.positions] = v[:, :, 0].to(self.values)
        return self.keys[layer, :n, :, :end].to(k), self.values[layer, :n, :, :end].to(v)

    def previous_tokens(self, input_ids: Tensor) -> Tensor:
        n, device = len(input_ids), self.tokens.device
        slots = torch.arange(n, device=device)
        self.tokens[slots, self.positions] = input_ids[:, 0]
        before = self.tokens[slots, (self.positions - 1).clamp(min=0)]
        return torch.where(self.positions > 0, before, -1)[:, None]

    def mask(self, T: int) -> Tensor:
        """Return (n, 1, 1, S): each slot attends to its filled positions and its new token."""
        columns = torch.arange(self.length + T, device=self.keys.device)
        return (columns <= self.positions[:, None])[:, None, None]

    def advance(self, T: int) -> None:
        self.lengths[: len(self.positions)] += T

    # ---- single slots ----

    def slot(self, b: int) -> KVCache:
        """Return slot b as a cache of batch size 1 that shares its memory."""
        view = object.__new__(KVCache)
        view.keys = self.keys[:, b : b + 1]
        view.values = self.values[:, b : b + 1]
        view.tokens = self.tokens[b : b + 1]
        view.length = int(self.lengths[b])
        return view

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the filled part of one slot over another."""
        length = int(self.lengths[source])
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
        self.tokens[target, :length] = self.tokens[source, :length]
        self.lengths[target] = length


Chunk = tuple[int, list[int]]  # a slot, and prompt tokens to append to it
LOGIT_ROWS = 64  # tokens of a prompt whose logits exist at the same time


class DecodeBackend(Protocol):
    """The computations of the engine."""

    name: str
    fallback_reason: str  # why torch computes instead of C; empty otherwise

    def prefill(self, cache: SlotCache, chunks: list[Chunk]) -> None:
        """Append prompt tokens to slots, at most one chunk for each slot."""

    def prefill_logits(self, cache: SlotCache, slot: int, ids: list[int]) -> Iterator[Tensor]:
        """Append prompt tokens to a slot; yield the logits (n, V) after them, a few at a time."""

    def decode(self, cache: SlotCache, tokens: list[int]) -> Tensor:
        """Append tokens[b] to each of the first slots b; return the next logits (B, V)."""

    def sample(self, logits: Tensor, params: SamplingParams, draws: Tensor) -> Tensor:
        """Return a token for each row of logits (B, V), as `sampling.sample_in_torch` does."""


class TorchBackend:
    """The model's own operations, for every device and dtype.

    Bfloat16 weights are widened first where the CPU does not multiply bfloat16.
    """

    name = "torch"

    def __init__(self, model: Transformer, fallback_reason: str = ""):
        self.model, self.fallback_reason = without_bfloat16_products(model), fallback_reason

    def prefill(self, cache: SlotCache, chunks: list[Chunk]) -> None:
        """Run the model over one chunk after another."""
        for slot, ids in chunks:
            if ids:
                batch = torch.tensor([ids], device=cache.keys.device)  # (1, T)
                self.model.hidden(batch, cache=cache.slot(slot))
                cache.lengths[slot] += len(ids)

    def prefill_logits(self, cache: SlotCache, slot: int, ids: list[int]) -> Iterator[Tensor]:
        """Run the model over a chunk; compute its logits in parts, which takes less memory."""
        if ids:
            batch = torch.tensor([ids], device=cache.keys.device)  # (1, T)
            hidden = self.model.hidden(batch, cache=cache.slot(slot))  # (1, T, C)
            cache.lengths[slot] += len(ids)
            for first in range(0, len(ids), LOGIT_ROWS):
                yield self.model.logits(hidden[0, first : first + LOGIT_ROWS])

    def decode(self, cache: SlotCache, tokens: list[int]) -> Tensor:
        """Run the model over the tokens of all slots at once."""
        positions = cache.begin_step(len(tokens))  # (B, 1)
        ids = torch.tensor(tokens, device=positions.device)[:, None]
        hidden = self.model.hidden(ids, positions=positions, cache=cache)  # (B, 1, C)
        return self.model.logits(hidden[:, 0])

    def sample(self, logits: Tensor, params: SamplingParams, draws: Tensor) -> Tensor:
        return sample_in_torch(logits, params, draws)
