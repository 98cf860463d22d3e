"""Models of which every next token's probability is known."""

import math
from pathlib import Path
from string import ascii_lowercase

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from pocketlm.checkpoint.format import checkpoint_metadata, save_checkpoint
from pocketlm.config.loading import config_from_dict
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.characters import CharTokenizer

BIGRAM = dict(
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
def bigram(probabilities: Tensor, context: int = 16) -> Transformer:
    """A Transformer of which each next token's probability is known: row i is what follows token i. Its layer adds nothing."""
    size = len(probabilities)
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=size, max_seq_len=context, d_model=size, **BIGRAM)
    ).eval()
    for p in (
        model.embed_positions.weight,
        model.layers[0].self_attn.o_proj.weight,
        model.layers[0].mlp.down_proj.weight,
    ):
        p.zero_()
    model.embed_tokens.weight.copy_(torch.eye(size))  # of length 1, which the norm makes sqrt(size)
    model.lm_head.weight.copy_(probabilities.log().T / math.sqrt(size))
    return model


def table(tokenizer: CharTokenizer, rows: dict[str, dict[str, float]]) -> Tensor:
    """The probabilities of `rows`, by symbols ("" ends and begins a document), and what is left spread over all other tokens."""
    ids = {symbol: i for symbol, i in tokenizer.ids.items()} | {"": tokenizer.eos_id}
    made = torch.full((tokenizer.vocab_size,) * 2, 1 / tokenizer.vocab_size)
    for before, after in rows.items():
        made[ids[before]] = (1 - sum(after.values())) / (tokenizer.vocab_size - len(after))
        for symbol, p in after.items():
            made[ids[before], ids[symbol]] = p
    return made


LETTERS = CharTokenizer("AB" + ascii_lowercase)


def save(
    path: str,
    model: Transformer,
    tokenizer: Tokenizer,
    step: int = 1,
    dropout: float = 0.0,
    **settings,
) -> None:
    sizes = {
        key: getattr(model.config, key)
        for key in ("n_layers", "d_model", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    }
    config = config_from_dict(
        {
            "model": sizes | settings | {"dropout": dropout},
            "data": {"tokenizer": "char"},
            "training": {"seq_len": model.config.max_seq_len},
        }
    )
    Path(path).parent.mkdir(exist_ok=True, parents=True)
    save_checkpoint(
        {
            "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()},
            "global_step": step,
            "kit": checkpoint_metadata(config, tokenizer.state(), tokens=step * 10, val_loss=2.0),
        },
        Path(path),
    )


def make_checkpoint(
    path: str,
    right: str,
    step: int = 1,
    tied: str = "",
    broken=False,
    tokenizer=LETTERS,
    context=16,
    **more,
) -> None:
    """One that has the letters of `right` right, with probability 0.6 against 0.2, and the others wrong, but for those that tie."""
    rows = {
        x: {"A": 0.6, "B": 0.2} if x in right else {"A": 0.2, "B": 0.6} for x in ascii_lowercase
    }
    rows |= {x: {"A": 0.4, "B": 0.4} for x in tied}
    model = bigram(table(tokenizer, rows), context)
    if broken:
        model.norm.weight.data[0] = math.nan
    save(path, model, tokenizer, step, **BIGRAM | more)
