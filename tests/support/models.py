"""Small random models, the Llama of transformers with the same weights, and their gradients."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model import ModelConfig, Transformer
from pocketlm.model.loss import cross_entropy

T = 13  # tokens of a row; odd, so that no kernel's block size divides it

TINY: dict[str, Any] = dict(
    vocab_size=61, max_seq_len=T, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2
)

# all that blocks read beside their input, and tokens beside themselves
MIXED: dict[str, Any] = dict(value_residual=True, embedding_shortcut=True, token_shift=True)

# Document ids of two rows of T tokens, of three and of two documents.
PACKED = torch.tensor([[4] * 5 + [9] * 6 + [2] * 2, [0] * 1 + [1] * 12])


@torch.no_grad()
def randomise_weights(model: Transformer) -> None:
    """Move every parameter, gains too, far enough from its initial value to matter."""
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=p.size(1) ** -0.5)
        else:
            torch.nn.init.uniform_(p, 0.5, 1.5)


def random_model(seed: int = 0, **sizes: Any) -> Transformer:
    """Return a tiny model with random weights; `sizes` change the config."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**TINY | sizes))
    randomise_weights(model)
    return model


def random_ids(batch: int = 2, length: int = T, vocab_size: int = TINY["vocab_size"]) -> Tensor:
    """Return the same random token ids (batch, length) every time."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return our cross-entropy of each next token, in nats per token."""
    targets = ids[:, 1:]
    return cross_entropy(logits[:, :-1], targets) / targets.numel()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradients by the names of our parameters."""
    return {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `theirs`."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def llama_config(config: ModelConfig) -> LlamaConfig:
    """Return the config of transformers for the same model."""
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
    """Return the Llama of transformers with the same weights, copied by name."""
    reference = LlamaForCausalLM(llama_config(model.config))
    theirs = {name.removeprefix("model."): p for name, p in reference.named_parameters()}
    ours = dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(ours[name])
    return reference
