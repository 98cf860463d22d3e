"""A small GPT-2 here and in transformers, with the same weights."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from model import ModelConfig, Transformer
from pocketlm.config.loading import load_config
from tests.support.models import T

ROOT = Path(__file__).parents[2]
Weights = dict[str, Tensor]


def preset(name: str, vocab_size: int, *overrides: str) -> ModelConfig:
    return load_config(ROOT / f"presets/{name}.yaml", overrides).with_vocab_size(vocab_size).model


@torch.no_grad()
def randomise(model: torch.nn.Module, d_model: int) -> None:
    """Every parameter far enough from its initial value to matter: matrices, gains around 1, biases around 0."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.normal_(std=d_model**-0.5) if p.dim() == 2 else p.normal_(
            0.0 if name.endswith("bias") else 1.0, 0.3
        )


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    randomise(model, config.d_model)
    return model


# ---- GPT-2: Hugging Face's ----


def gpt2_pair(n_layers: int, n_heads: int) -> tuple[Transformer, GPT2LMHeadModel]:
    """Our preset's model and Hugging Face's, both small, with the same random parameters."""
    keys = [
        "model.d_model=32",
        f"model.n_layers={n_layers}",
        f"model.n_heads={n_heads}",
        f"model.max_seq_len={T}",
        f"training.seq_len={T}",
    ]
    ours = Transformer(preset("gpt2_124m", 61, *keys))
    sizes = dict(vocab_size=61, n_positions=T, n_embd=32, n_layer=n_layers, n_head=n_heads)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    theirs = GPT2LMHeadModel(
        GPT2Config(**sizes, **no_dropout, attn_implementation="eager", use_cache=False)
    )
    randomise(theirs, d_model=32)
    ours.load_state_dict(
        in_our_names(dict(theirs.named_parameters()))
    )  # strict: all of ours, and nothing else
    return ours, theirs


def in_our_names(theirs: Weights) -> Weights:
    """Parameters or gradients of Hugging Face's GPT-2 by our names: its Conv1D matrices are (in, out), and c_attn is q, k, v in one."""
    outer = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
    inner = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
    }
    inner |= {"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
    ours = {}
    for name, p in theirs.items():
        place, kind = name.removeprefix("transformer.").rsplit(".", 1)
        if place in outer:
            ours[f"{outer[place]}.{kind}"] = p
            continue
        _, layer, module = place.split(".", 2)
        if module == "attn.c_attn":
            parts = zip("qkv", p.T.chunk(3) if p.dim() == 2 else p.chunk(3), strict=True)
            ours |= {f"layers.{layer}.self_attn.{part}_proj.{kind}": chunk for part, chunk in parts}
        else:
            ours[f"layers.{layer}.{inner[module]}.{kind}"] = p.T if p.dim() == 2 else p
    return ours
