"""Bigram models: Transformers with a known probability for every next token."""

import math
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from pocketlm.checkpoint.format import checkpoint_metadata, save_weights
from pocketlm.config.sections import Config, DataConfig, TrainingConfig
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.characters import CharTokenizer

LETTERS = CharTokenizer("AB" + ascii_lowercase)

SIZES: dict[str, Any] = dict(
    max_seq_len=16,
    n_layers=1,
    n_heads=1,
    n_kv_heads=1,
    d_ff=1,
    mlp="relu",
    position="learned",
    tie_embeddings=False,
    norm_eps=1e-12,
)


@torch.no_grad()
def bigram_model(probabilities: Tensor, **sizes: Any) -> Transformer:
    """Return a model in which row i of `probabilities` (V, V) is what follows token i.

    Its only layer adds nothing to the embedding. `sizes` change the config.
    """
    n = len(probabilities)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=n, d_model=n, **SIZES | sizes)).eval()
    layer = model.layers[0]
    for linear in (model.embed_positions, layer.self_attn.o_proj, layer.mlp.down_proj):
        linear.weight.zero_()
    model.embed_tokens.weight.copy_(torch.eye(n))  # RMSNorm scales these rows to length sqrt(n)
    model.lm_head.weight.copy_(probabilities.log().T / math.sqrt(n))
    return model


def bigram_table(tokenizer: CharTokenizer, rows: dict[str, dict[str, float]]) -> Tensor:
    """Return probabilities (V, V) from {symbol: {next symbol: probability}}.

    The rest of each row is spread evenly. "" is the token that ends and begins a document.
    """
    ids = tokenizer.ids | {"": tokenizer.eos_id}
    n = tokenizer.vocab_size
    probabilities = torch.full((n, n), 1 / n)
    for symbol, following in rows.items():
        probabilities[ids[symbol]] = (1 - sum(following.values())) / (n - len(following))
        for next_symbol, p in following.items():
            probabilities[ids[symbol], ids[next_symbol]] = p
    return probabilities


def save_model(path: str, model: Transformer, tokenizer: Tokenizer, step: int = 1) -> None:
    """Write a checkpoint of the model."""
    config = Config(
        model=model.config,
        data=DataConfig(tokenizer="char"),
        training=TrainingConfig(seq_len=model.config.max_seq_len),
    )
    metadata = checkpoint_metadata(config, tokenizer.state(), tokens=step * 10, val_loss=2.0)
    Path(path).parent.mkdir(exist_ok=True, parents=True)
    save_weights(model.state_dict(), step, metadata, Path(path))


def make_checkpoint(
    path: str,
    right: str,
    step: int = 1,
    *,
    tied: str = "",
    broken: bool = False,
    tokenizer: CharTokenizer = LETTERS,
    **sizes: Any,
) -> None:
    """Write a checkpoint that continues letters with "A" (right) or with "B".

    After the letters in `right`, "A" has probability 0.6 and "B" 0.2; after those in `tied`, both
    have 0.4; after the others, "B" has 0.6. A broken one has a weight that is NaN.
    """
    rows = dict.fromkeys(ascii_lowercase, {"A": 0.2, "B": 0.6})
    rows |= dict.fromkeys(right, {"A": 0.6, "B": 0.2})
    rows |= dict.fromkeys(tied, {"A": 0.4, "B": 0.4})
    model = bigram_model(bigram_table(tokenizer, rows), **sizes)
    if broken:
        model.norm.weight.data[0] = math.nan
    save_model(path, model, tokenizer, step)
