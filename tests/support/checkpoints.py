"""Checkpoints of tiny models whose greedy text does not repeat itself."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from pocketlm.checkpoint.format import checkpoint_metadata, save_weights
from pocketlm.config.sampling import SamplingConfig
from pocketlm.config.sections import Config, DataConfig, TrainingConfig
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer

SIZES: dict[str, Any] = dict(
    vocab_size=61, max_seq_len=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2
)


def confident_model(seed: int = 0, **sizes: Any) -> Transformer:
    """Return a tiny model in evaluation mode; `sizes` change the config.

    Its weights are so large that its greedy text does not repeat itself at once.
    """
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SIZES | sizes)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=2 * p.size(1) ** -0.5)
        else:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def byte_ids(length: int, batch: int = 1) -> Tensor:
    """Return random token ids (batch, length), the same for the same length."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(SIZES["vocab_size"], (batch, length), generator=generator)


def write_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    val_loss: float | None = 1.0,
    tokenizer: Tokenizer | None = None,
    sampling: SamplingConfig | None = None,
    **sizes: Any,
) -> Path:
    """Write a checkpoint of `confident_model`, as after 7 steps; return its path."""
    tokenizer = tokenizer or ByteTokenizer()
    model = confident_model(seed, **{"vocab_size": tokenizer.vocab_size, **sizes})
    config = Config(
        model=model.config,
        data=DataConfig(tokenizer=tokenizer.name),
        training=TrainingConfig(seq_len=model.config.max_seq_len),
        sampling=sampling or SamplingConfig(),
    )
    metadata = checkpoint_metadata(config, tokenizer.state(), tokens=5, val_loss=val_loss)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model.state_dict(), 7, metadata, path)
    return path


def tiny_checkpoint(seed: int = 0, **sizes: Any) -> tuple[Transformer, dict[str, Any]]:
    """Return a model of one layer and 16 tokens, and the content of its checkpoint."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=16, max_seq_len=12, n_layers=1, d_model=8, n_heads=2, d_ff=8) | sizes
    config = Config(model=ModelConfig(**sizes), training=TrainingConfig(seq_len=10))
    model = Transformer(config.model).eval()
    tokenizer = CharTokenizer("abc é😀")
    metadata = checkpoint_metadata(config, tokenizer.state(), tokens=5, val_loss=1.25)
    weights = {f"model.{name}": p for name, p in model.state_dict().items()}
    return model, {"state_dict": weights, "global_step": 7, "kit": metadata}


def resumable_checkpoint(
    step: int, val_loss: float | None = None, seed: int = 0, **training: Any
) -> dict[str, Any]:
    """Return the content of a checkpoint from which a run can resume; `training` are its keys.

    The optimizer state is all that is missing for a real run.
    """
    model, state = tiny_checkpoint(seed)
    settings = TrainingConfig(seq_len=10, **{"max_steps": 12, "val_every_steps": 5} | training)
    config = Config(model=model.config, training=settings)
    counters = {"tokens": 5 * step, "val_loss": val_loss, "data_sha256": "0"}
    state["kit"] = checkpoint_metadata(config, state["kit"]["tokenizer"], **counters)
    optimizer = {"optimizer": {"step": {"total": {"completed": step}}}}
    progress = {"epoch_loop.automatic_optimization.optim_progress": optimizer}
    random_state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    return state | {
        "global_step": step,
        "loops": {"fit_loop": progress},
        "callbacks": {"RandomState": random_state, "Checkpoints": {"best": val_loss}},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "interval": {"nats": 0.0, "targets": 0, "tokens_seen": 5 * step, "validation": {}},
    }
