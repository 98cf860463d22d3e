"""Checkpoints of tiny models whose greedy text does not repeat itself."""

from pathlib import Path

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from pocketlm.checkpoint.format import checkpoint_metadata
from pocketlm.config.sampling import SamplingConfig
from pocketlm.config.sections import Config, DataConfig, TrainingConfig
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer

SIZES = dict(vocab_size=61, max_seq_len=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2)


def confident_model(seed: int = 0, **sizes: object) -> Transformer:
    """A tiny model with weights so large that its greedy text does not repeat itself at once."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SIZES | sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(
            p, std=2 * p.size(1) ** -0.5
        ) if p.dim() == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def byte_ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(
        SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(length)
    )


# ---- the command line ------------------------------------------------------------------------------------------------


def write_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    val_loss: float | None = 1.0,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    sampling: SamplingConfig | None = None,
    **sizes: object,
) -> Path:
    """What train.py would write for a tiny model of random weights."""
    tokenizer = tokenizer or ByteTokenizer()
    model = confident_model(seed, vocab_size=vocab_size or tokenizer.vocab_size, **sizes)
    config = Config(
        model=model.config,
        data=DataConfig(tokenizer=tokenizer.name),
        training=TrainingConfig(seq_len=model.config.max_seq_len),
        sampling=sampling or SamplingConfig(),
    )
    kit = checkpoint_metadata(config, tokenizer.state(), tokens=5, val_loss=val_loss)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()},
            "global_step": 7,
            "kit": kit,
        },
        path,
    )
    return path
