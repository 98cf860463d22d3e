"""Small configs of three kinds of Transformer, with GPT-2's vocabulary."""

from typing import Any

from model import ModelConfig
from pocketlm.config.sections import Config, TrainingConfig

SIZES = {"vocab_size": 50_257, "max_seq_len": 32, "n_layers": 2, "d_model": 64}
LLAMA = ModelConfig(**SIZES)
GPT2 = ModelConfig(
    **SIZES,
    n_kv_heads=None,
    mlp="gelu",
    position="learned",
    norm="layernorm",
    bias=True,
    dropout=0.1,
)
MICROGPT = ModelConfig(
    **SIZES,
    n_kv_heads=None,
    mlp="relu",
    position="learned",
    norm_gain=False,
    embed_norm=True,
    final_norm=False,
    tie_embeddings=False,
)
KINDS = {"llama": LLAMA, "gpt2": GPT2, "microgpt": MICROGPT}


def config_for(kind: ModelConfig, chunk: int, **training: Any) -> Config:
    """Return a config with two rows of 32 tokens a batch, and a loss in chunks of tokens."""
    section = TrainingConfig(seq_len=32, micro_batch_size=2, loss_chunk=chunk, **training)
    return Config(model=kind, training=section)
