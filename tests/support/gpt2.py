"""Models of the presets, and a small GPT-2 with the same weights here and in transformers."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from model import ModelConfig, Transformer
from pocketlm.config.loading import load_config
from tests.support.models import T

ROOT = Path(__file__).parents[2]
Weights = dict[str, Tensor]

# Names of GPT-2's modules in transformers, and ours.
OUTER_MODULES = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
LAYER_MODULES = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def preset(name: str, vocab_size: int, *overrides: str) -> ModelConfig:
    """Return the model config of a preset."""
    return load_config(ROOT / f"presets/{name}.yaml", overrides).with_vocab_size(vocab_size).model


@torch.no_grad()
def randomise(model: torch.nn.Module, d_model: int) -> None:
    """Move every parameter far enough from its initial value to matter.

    Gains are around 1, biases around 0.
    """
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.normal_(std=d_model**-0.5)
        else:
            p.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)


def model_of(config: ModelConfig) -> Transformer:
    """Return a model with random weights."""
    model = Transformer(config)
    randomise(model, config.d_model)
    return model


def gpt2_pair(n_layers: int, n_heads: int) -> tuple[Transformer, GPT2LMHeadModel]:
    """Return our model and that of transformers, both small, with the same random weights."""
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
    ours.load_state_dict(in_our_names(dict(theirs.named_parameters())), strict=True)
    return ours, theirs


def in_our_names(theirs: Weights) -> Weights:
    """Rename the parameters, or their gradients, of GPT-2 in transformers.

    Its Conv1D matrices are (in, out), and c_attn holds q, k and v.
    """
    ours = {}
    for name, p in theirs.items():
        path, kind = name.removeprefix("transformer.").rsplit(".", 1)
        p = p.T if p.dim() == 2 and path not in OUTER_MODULES else p
        if path in OUTER_MODULES:
            ours[f"{OUTER_MODULES[path]}.{kind}"] = p
            continue
        _, layer, module = path.split(".", 2)
        if module == "attn.c_attn":
            for letter, part in zip("qkv", p.chunk(3), strict=True):
                ours[f"layers.{layer}.self_attn.{letter}_proj.{kind}"] = part
        else:
            ours[f"layers.{layer}.{LAYER_MODULES[module]}.{kind}"] = p
    return ours
