"""Pretrained models in a GGUF file, llama.cpp's format of keys, tokenizer and tensors in one file.

The tensors may be quantised; they become float32.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch

from pocketlm.conversion.gguf_tokenizer import KEY_PREFIX, TOKENIZER_KEYS, read_tokenizer
from pocketlm.conversion.layout import (
    GPT2_SETTINGS,
    Layout,
    Pretrained,
    Source,
    Tensors,
    Values,
    assemble,
    choose_template,
    require_key,
    require_keys,
    require_supported,
    resolve_tied_head,
    unread_note,
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


# further keys of an architecture that are read, or follow from the tensors
OTHER_KEYS = (
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "expert_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
)

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # the name of one file of several


def read_gguf(path: Path, name: str) -> Pretrained:
    """Read a Llama or GPT-2; `name` becomes the tokenizer's name. Raises UserError.

    `path` may be any file of a model that is split; the others are beside it.
    """
    parts = all_parts(path)
    values, tensors = read_part(parts[0])
    for part in parts[1:]:
        tensors |= read_part(part)[1]
    kind = values.get("general.architecture")
    if kind not in LAYOUTS:
        supported = " and ".join(LAYOUTS)
        raise UserError(f"{path} is of a model of type {kind!r}; only {supported} can be converted")
    if len(parts) == 1 and values.get("split.count", 1) > 1:
        raise UserError(
            f"{path} is one of {values['split.count']} files of a model, and is not called "
            "NAME-00001-of-0000N.gguf; give the files their names back"
        )
    layout, origin = LAYOUTS[kind], str(path)
    with damage_named(path):
        settings = read_model_settings(kind, values, origin)
        tokenizer = read_tokenizer(values, name, origin)
    embedding = layout.foreign_name("embed_tokens.weight")
    settings["tie_embeddings"], notes = resolve_tied_head(tensors, layout, None, origin)
    settings["bias"] = layout.foreign_name("layers.0.self_attn.q_proj.bias") in tensors
    if embedding in tensors:
        settings["vocab_size"] = len(tensors[embedding])
    else:  # the missing tensor is reported later
        settings["vocab_size"] = tokenizer.vocab_size
    notes += unread_note(unread_keys(kind, values), origin)
    template, template_notes = read_chat_template(values, origin)
    source = Source(origin, settings, tokenizer, template, (*notes, *template_notes))
    return assemble(source, tensors, layout)


def all_parts(path: Path) -> list[Path]:
    """Return the files of a model, the one with its keys first. Raises UserError for a gap."""
    match = PART.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count = match.groups()
    parts = [path.with_name(f"{stem}-{n:05}-of-{count}.gguf") for n in range(1, int(count) + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise UserError(
            f"{path} is one of {int(count)} files of a model, of which there is no "
            f"{', '.join(missing[:3])} beside it; download all of them"
        )
    return parts


def read_part(path: Path) -> tuple[Values, Tensors]:
    """Return the keys and tensors of a file. Raises UserError."""
    with damage_named(path):
        reader = gguf.GGUFReader(path)
        values = {key: entry.contents() for key, entry in reader.fields.items()}
        return values, dequantize_tensors(reader, path)


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what the reader raises for a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the reader checks nothing, and so fails in a dozen ways
        raise UserError(
            f"{path} is truncated or damaged: its contents make no sense ({error}); "
            "download it again"
        ) from error


def read_chat_template(values: Values, origin: str) -> tuple[str | None, list[str]]:
    """Return the chat template, and a note if it is not clear which one that is."""
    key = "tokenizer.chat_template"
    named = {k.removeprefix(f"{key}."): v for k, v in values.items() if k.startswith(f"{key}.")}
    return choose_template(named | ({"default": values[key]} if key in values else {}), origin)


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


def unread_keys(kind: str, values: Values) -> set[str]:
    """Return the keys of the architecture and of its tokenizer that nothing here reads."""
    read = {f"{kind}.{key}" for key in (*SIZE_KEYS.values(), *OTHER_KEYS)} | TOKENIZER_KEYS
    return {key for key in values if key.startswith((f"{kind}.", KEY_PREFIX))} - read


def shortest_decimal(value: float) -> float:
    """Return the shortest decimal number with the same float32, which is what the file stores.

    >>> shortest_decimal(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value)))
