"""Pretrained models in a GGUF file, llama.cpp's format of keys, tokenizer and tensors in one file.

The tensors may be quantised; they become float32.
"""

from pathlib import Path

import gguf
import numpy as np
import torch

from pocketlm.conversion.gguf_tokenizer import read_tokenizer
from pocketlm.conversion.layout import (
    GPT2_SETTINGS,
    Layout,
    Pretrained,
    Source,
    Tensors,
    Values,
    assemble,
    drop_tied_head,
    require_key,
    require_keys,
    require_supported,
)
from pocketlm.errors import UserError

GGUF_NAMES = {
    "layers": "blk",
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED_NAMES = {f"self_attn.{part}_proj": "attn_qkv" for part in "qkv"}

LAYOUTS = {
    "llama": Layout(GGUF_NAMES, interleaved=True),
    "gpt2": Layout(GGUF_NAMES | FUSED_NAMES, fused=True),
}

# keys below the architecture's name, by our names
SIZE_KEYS = {
    "n_layers": "block_count",
    "d_model": "embedding_length",
    "d_ff": "feed_forward_length",
    "max_seq_len": "context_length",
    "n_heads": "attention.head_count",
}


def read_gguf(path: Path, name: str) -> Pretrained:
    """Read a Llama or GPT-2; `name` becomes the tokenizer's name. Raises UserError."""
    try:
        reader = gguf.GGUFReader(path)
        values = {key: entry.contents() for key, entry in reader.fields.items()}
        kind = values.get("general.architecture")
        if kind not in LAYOUTS:
            supported = " and ".join(LAYOUTS)
            raise UserError(
                f"{path} is of a model of type {kind!r}; only {supported} can be converted"
            )
        settings = read_model_settings(kind, values, str(path))
        tokenizer = read_tokenizer(values, name, str(path))
        tensors = dequantize_tensors(reader, path)
    except UserError:
        raise
    except Exception as error:  # the reader checks nothing, and so fails in a dozen ways
        raise UserError(
            f"{path} is truncated or damaged: its contents make no sense ({error}); "
            "download it again"
        ) from error
    layout = LAYOUTS[kind]
    embedding = layout.foreign_name("embed_tokens.weight")
    head = layout.foreign_name("lm_head.weight")
    settings["tie_embeddings"] = drop_tied_head(tensors, head, embedding)
    settings["bias"] = layout.foreign_name("layers.0.self_attn.q_proj.bias") in tensors
    if embedding in tensors:
        settings["vocab_size"] = len(tensors[embedding])
    else:  # the missing tensor is reported later
        settings["vocab_size"] = tokenizer.vocab_size
    source = Source(str(path), settings, tokenizer, values.get("tokenizer.chat_template"))
    return assemble(source, tensors, layout)


def dequantize_tensors(reader: gguf.GGUFReader, path: Path) -> Tensors:
    """Return all tensors in float32. Raises UserError for an unsupported quantisation."""
    tensors = {}
    for entry in reader.tensors:
        try:
            array = gguf.dequantize(entry.data, entry.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{path}: {entry.name} is stored as {entry.tensor_type.name}, "
                "which is not supported; use another quantisation"
            ) from None
        tensors[entry.name] = torch.from_numpy(np.array(array, np.float32))
    return tensors


def read_model_settings(kind: str, values: Values, origin: str) -> Values:
    """Return our model section for the keys that begin with the architecture's name."""
    keys = {ours: f"{kind}.{key}" for ours, key in SIZE_KEYS.items()}
    settings: Values = {**require_keys(values, keys, origin)}
    norm = "layer_norm_rms_epsilon" if kind == "llama" else "layer_norm_epsilon"
    norm_eps = require_key(values, f"{kind}.attention.{norm}", float, origin)
    settings["norm_eps"] = shortest_decimal(norm_eps)
    if kind == "gpt2":
        return GPT2_SETTINGS | settings
    settings["n_kv_heads"] = values.get("llama.attention.head_count_kv")
    settings["rope_theta"] = shortest_decimal(values.get("llama.rope.freq_base", 10_000.0))
    head_dim = settings["d_model"] // settings["n_heads"]
    supported = {
        "llama.rope.dimension_count": (head_dim,),
        "llama.attention.key_length": (head_dim,),
        "llama.attention.value_length": (head_dim,),
        "llama.rope.scaling.type": ("none",),
        "llama.rope.scale_linear": (1.0,),
        "llama.expert_count": (0,),
    }
    require_supported(values, supported, origin)
    return settings


def shortest_decimal(value: float) -> float:
    """Return the shortest decimal number with the same float32, which is what the file stores.

    >>> shortest_decimal(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value)))
