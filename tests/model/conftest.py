"""Fixtures of the tests of the model."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

import model
from pocketlm.model import attention, kernels
from pocketlm.model.attention import TiledAttention
from tests.support.losses import next_token_loss


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make all new models float64 throughout.

    The norm, the rotary angles and the loss of transformers pass through float32: they are
    replaced.
    """

    def norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def rotary(
        self: LlamaRotaryEmbedding, x: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        half = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat((half, half), dim=-1)
        return angles.cos(), angles.sin()

    def loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return next_token_loss(logits, labels)

    monkeypatch.setattr(LlamaForCausalLM, "loss_function", staticmethod(loss))
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rotary)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train as on a machine without a C compiler."""
    monkeypatch.setattr(kernels, "load", lambda: None)


@pytest.fixture
def attention_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that records which kernel computes each attention: tiled or torch."""
    kernels: list[str] = []
    torch_attention = F.scaled_dot_product_attention

    class RecordedTiledAttention:
        @staticmethod
        def apply(*inputs: Tensor | None) -> Tensor:
            kernels.append("tiled")
            return TiledAttention.apply(*inputs)

    def recorded_torch_attention(*args: Any, **kwargs: Any) -> Tensor:
        kernels.append("torch")
        return torch_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "TiledAttention", RecordedTiledAttention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded_torch_attention)
    return kernels


@pytest.fixture
def forced_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute all attention in tiles of 4 rows, whatever the precision."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        return TiledAttention.apply(q, k, v, mask)

    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(model, "attend", attend)
