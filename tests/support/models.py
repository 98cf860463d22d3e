"""Small random models, their transformers twins, and how far two results are apart."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model import ModelConfig, Transformer
from pocketlm.model.loss import cross_entropy

T = 13  # odd, so that no kernel's block divides it


TINY = dict(vocab_size=61, max_seq_len=T, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2)


def random_model(seed: int = 0, **sizes: Any) -> Transformer:
    """A tiny model whose every parameter, gains too, is far enough from its initial value to matter."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**TINY | sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.size(1) ** -0.5) if p.dim() == 2 else torch.nn.init.uniform_(
            p, 0.5, 1.5
        )
    return model


def random_ids(batch: int = 2, length: int = T, vocab_size: int = TINY["vocab_size"]) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Nats a token of predicting each next token, by our loss."""
    targets = ids[:, 1:]
    return cross_entropy(logits[:, :-1], targets) / targets.numel()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Length of the difference, in units of the reference's length."""
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- Hugging Face's Llama ----


def llama_config(config: ModelConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        num_hidden_layers=config.n_layers,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="sdpa",
        use_cache=False,
    )


def reference_of(model: Transformer) -> LlamaForCausalLM:
    """Hugging Face's model with the same weights, copied by name."""
    reference = LlamaForCausalLM(llama_config(model.config))
    theirs = {name.removeprefix("model."): p for name, p in reference.named_parameters()}
    ours = dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(ours[name])
    return reference


class Precision(NamedTuple):
    """What our model computes in, and how far it may be from the reference: relative errors, and nats in ten steps."""

    dtype: torch.dtype
    logits: float
    loss: float
    gradients: float
    ten_losses: float


# 1e-5: some 100 roundings (6e-8 each) in another order; the loss is a mean, in which they cancel. Ten steps: Adam divides
# by the gradient's size, so that roundings of small entries count in full
FLOAT32 = Precision(torch.float32, logits=1e-5, loss=2e-6, gradients=1e-5, ten_losses=1e-4)


# 1e-9: far above float64's rounding, far below what anything left in float32 would show (1e-7)
FLOAT64 = Precision(torch.float64, logits=1e-9, loss=1e-9, gradients=1e-9, ten_losses=1e-9)


def ten_losses(model: torch.nn.Module, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Losses before each of ten AdamW steps on one batch."""
    ids = random_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(10):
        loss = mean_loss(logits_of(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


PACKED = torch.tensor(
    [[4] * 5 + [9] * 6 + [2] * 2, [0] * 1 + [1] * 12]
)  # two rows of T tokens: 3 and 2 documents
