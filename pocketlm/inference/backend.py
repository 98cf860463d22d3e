"""Decode backends: who computes what the engine needs of a model, compiled C or torch.

    engine = Engine(model, max_slots=16)                               # C if possible, else torch
    engine = Engine(model, max_slots=16, backend=TorchBackend(model))  # torch

The native backend (native.py) is several times faster than torch on a small model, but needs a CPU
and a C compiler. Its logits differ from torch's by rounding only: sums run in another order.
"""

from typing import Protocol

import torch
from torch import Tensor

from model import Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.inference.cache import SlotCache
from pocketlm.inference.sampling import sample_in_torch

Chunk = tuple[int, list[int]]  # a slot, and prompt tokens to append to it


class DecodeBackend(Protocol):
    """The three computations of the engine."""

    name: str
    fallback_reason: str  # why torch computes instead of C; empty otherwise

    def prefill(self, cache: SlotCache, chunks: list[Chunk]) -> None:
        """Append prompt tokens to slots, at most one chunk for each slot."""

    def decode(self, cache: SlotCache, tokens: list[int]) -> Tensor:
        """Append tokens[b] to each of the first slots b; return the next logits (B, V)."""

    def sample(self, logits: Tensor, params: SamplingParams, draws: Tensor) -> Tensor:
        """Return a token for each row of logits (B, V), as `sampling.sample_in_torch` does."""


class TorchBackend:
    """The model's own operations, for every device and dtype."""

    name = "torch"

    def __init__(self, model: Transformer, fallback_reason: str = ""):
        self.model, self.fallback_reason = model, fallback_reason

    def prefill(self, cache: SlotCache, chunks: list[Chunk]) -> None:
        """Run the model over one chunk after another."""
        for slot, ids in chunks:
            if ids:
                batch = torch.tensor([ids], device=cache.keys.device)  # (1, T)
                self.model.hidden(batch, cache=cache.slot(slot))
                cache.lengths[slot] += len(ids)

    def decode(self, cache: SlotCache, tokens: list[int]) -> Tensor:
        """Run the model over the tokens of all slots at once."""
        positions = cache.begin_step(len(tokens))  # (B, 1)
        ids = torch.tensor(tokens, device=positions.device)[:, None]
        hidden = self.model.hidden(ids, positions=positions, cache=cache)  # (B, 1, C)
        return self.model.logits(hidden[:, 0])

    def sample(self, logits: Tensor, params: SamplingParams, draws: Tensor) -> Tensor:
        return sample_in_torch(logits, params, draws)
