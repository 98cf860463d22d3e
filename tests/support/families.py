"""Families of models that Llama's relatives belong to, each in our terms and in transformers'."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from model import ModelConfig, Transformer
from pocketlm.model.rope import RopeScaling

CONTEXT = 48
ORIGINAL = 12  # of the context of pretraining, where RoPE is scaled
SIZES: dict[str, Any] = dict(
    vocab_size=384, max_seq_len=CONTEXT, n_layers=2, d_model=32, n_heads=4, d_ff=40
)
ROPE = {"rope_theta": 500.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}


@dataclass(frozen=True)
class Family:
    """Fields of ModelConfig beside SIZES, and the class and keys of the same config elsewhere."""

    ours: dict[str, Any]
    kind: type[PreTrainedConfig] = LlamaConfig
    theirs: dict[str, Any] = field(default_factory=dict)


def scaled(rope_type: str, ours: dict[str, Any], **theirs: Any) -> Family:
    """Return a Llama with scaled RoPE."""
    original = {} if rope_type == "linear" else {"original_max_seq_len": ORIGINAL}
    scaling = RopeScaling(rope_type, **original, **ours)
    return Family(
        dict(rope_theta=500.0, rope_scaling=scaling),
        theirs={"rope_parameters": {"rope_type": rope_type, **ROPE, **theirs}},
    )


FAMILIES = {
    "qwen2": Family(dict(attention_bias="qkv"), Qwen2Config),
    "qwen3": Family(dict(qk_norm=True, head_dim=12), Qwen3Config, dict(head_dim=12)),
    "qwen3, biases": Family(
        dict(qk_norm=True, head_dim=8, attention_bias="all", n_kv_heads=1),
        Qwen3Config,
        dict(head_dim=8, attention_bias=True),
    ),
    "mistral": Family(  # 4 heads do not divide the width
        dict(head_dim=6, d_model=30), MistralConfig, dict(head_dim=6, sliding_window=None)
    ),
    "wide heads": Family(dict(head_dim=12), theirs=dict(head_dim=12)),
    "smollm": Family(dict(n_heads=8, n_kv_heads=4, tie_embeddings=False)),
    "attention bias": Family(dict(attention_bias="all"), theirs=dict(attention_bias=True)),
    "mlp bias": Family(dict(bias=True, attention_bias="none"), theirs=dict(mlp_bias=True)),
    "llama 3": scaled("llama3", LLAMA3, **LLAMA3),
    "linear": scaled("linear", dict(factor=3.0), factor=3.0),
    "yarn": scaled("yarn", dict(factor=4.0), factor=4.0),
    "yarn, all keys": scaled(
        "yarn",
        dict(factor=4.0, attention_factor=1.5, beta_fast=3.0, beta_slow=0.5, truncate=False),
        **dict(factor=4.0, attention_factor=1.5, beta_fast=3.0, beta_slow=0.5, truncate=False),
    ),
}


def our_config(family: Family) -> ModelConfig:
    return ModelConfig(**SIZES | family.ours)


def their_config(family: Family) -> PreTrainedConfig:
    """Return the config of transformers for the same model."""
    ours = our_config(family)
    sizes = dict(
        vocab_size=ours.vocab_size,
        max_position_embeddings=ours.max_seq_len,
        num_hidden_layers=ours.n_layers,
        hidden_size=ours.d_model,
        intermediate_size=ours.d_ff,
        num_attention_heads=ours.n_heads,
        num_key_value_heads=ours.n_kv_heads,
        rms_norm_eps=ours.norm_eps,
        tie_word_embeddings=ours.tie_embeddings,
    )
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": ours.rope_theta}}
    return family.kind(**sizes | rope | family.theirs)


def their_model(family: Family, ours: Transformer) -> PreTrainedModel:
    """Return the model of transformers with the same weights, copied by name."""
    config = their_config(family)
    theirs = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    weights = {name.removeprefix("model."): p for name, p in theirs.named_parameters()}
    parameters = dict(ours.named_parameters())
    assert weights.keys() == parameters.keys()
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(parameters[name])
    return theirs
