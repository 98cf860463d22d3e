"""Pretrained models in a GGUF file, llama.cpp's format of keys, tokenizer and tensors in one file.

The tensors may be quantised; they become float32.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch

from pocketlm.config.strict_yaml import build_dataclass
from pocketlm.conversion.gguf_tokenizer import KEY_PREFIX, TOKENIZER_KEYS, read_tokenizer
from pocketlm.conversion.layout import (
    GPT2_SETTINGS,
    Layout,
    Pretrained,
    Source,
    Values,
    assemble,
    choose_template,
    require_key,
    require_keys,
    require_supported,
    resolve_tied_head,
    unread_note,
)
from pocketlm.conversion.stored import StoredTensors
from pocketlm.errors import UserError
from pocketlm.model.rope import RopeScaling, rope_frequencies

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
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED_NAMES = {f"self_attn.{part}_proj": "attn_qkv" for part in "qkv"}

# llama.cpp's tensor of what the frequencies of RoPE are divided by. In files of this program, the
# key has the options that it follows from.
ROPE_FACTORS, ROPE_SCALING_KEY = "rope_freqs.weight", "pocketlm.rope_scaling"
LLAMA3 = {  # of all Llamas from 3.1 on, which have different factors
    "kind": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 8192,
}

LAYOUTS = {
    "llama": Layout(GGUF_NAMES, interleaved=True, buffers=re.escape(ROPE_FACTORS)),
    "qwen2": Layout(GGUF_NAMES),
    "qwen3": Layout(GGUF_NAMES),
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
    *(
        f"rope.scaling.{name}"
        for name in ("type", "factor", "original_context_length", "finetuned")
    ),
)
# keys of YaRN with the only value that is read
YARN_DEFAULTS = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # the name of one file of several


def read_gguf(path: Path, name: str) -> Pretrained:
    """Read a model of one of LAYOUTS; `name` becomes the tokenizer's name. Raises UserError.

    `path` may be any file of a model that is split; the others are beside it.
    """
    parts = all_parts(path)
    tensors = StoredTensors()
    values, *_ = [read_part(part, tensors) for part in parts]
    kind = values.get("general.architecture")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise UserError(
            f"{path} is of a model of type {kind!r}; those that can be converted are "
            f"{', '.join(LAYOUTS)}"
        )
    n_parts = require_key({"split.count": 1} | values, "split.count", int, str(path))
    if len(parts) == 1 and n_parts > 1:
        raise UserError(
            f"{path} is one of {n_parts} files of a model, and is not called "
            "NAME-00001-of-0000N.gguf; give the files their names back"
        )
    layout, origin = LAYOUTS[kind], str(path)
    with damage_named(path):
        settings = read_model_settings(kind, values, origin)
        if kind != "gpt2":
            settings |= read_scaling(kind, values, tensors, settings, origin)
        tokenizer = read_tokenizer(values, name, origin)
    embedding = layout.foreign_name("embed_tokens.weight")
    settings["tie_embeddings"], notes = resolve_tied_head(tensors, layout, None, origin)
    settings |= read_biases(tensors, layout)
    if embedding in tensors:
        settings["vocab_size"] = len(tensors[embedding])
    else:  # the missing tensor is reported later
        settings["vocab_size"] = tokenizer.vocab_size
    notes += unread_note(unread_keys(kind, values), origin)
    notes += vocabulary_note(kind, values, settings["vocab_size"], origin)
    template, template_notes = read_chat_template(values, origin)
    values.clear()  # lists of all tokens, beside which the weights are read
    source = Source(origin, settings, tokenizer, template, (*notes, *template_notes))
    return assemble(source, tensors, layout)


def vocabulary_note(kind: str, values: Values, size: int, origin: str) -> list[str]:
    """Return a note on a size of the vocabulary that is not the embedding's; llama.cpp reads none.

    Raises UserError if it is no size.
    """
    key = f"{kind}.vocab_size"
    if key not in values or require_key(values, key, int, origin) == size:
        return []
    return [f"{origin}: {key} is {values[key]}, and the embedding has {size} rows, which count"]


def read_biases(tensors: StoredTensors, layout: Layout) -> Values:
    """Return which biases a model has, by those of its first block."""
    q, o, up = (
        layout.foreign_name(f"layers.0.{part}_proj.bias") in tensors
        for part in ("self_attn.q", "self_attn.o", "mlp.up")
    )
    return {"bias": up, "attention_bias": "all" if o else "qkv" if q else "none"}


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


def read_part(path: Path, tensors: StoredTensors) -> Values:
    """Return the keys of a file, and add its tensors. Raises UserError."""
    with damage_named(path), np.errstate(over="raise"):  # of offsets
        reader = gguf.GGUFReader(path)
        end, previous = 0, ""
        for entry in sorted(reader.tensors, key=lambda entry: entry.data_offset):
            require_dequantizable(entry, path)
            problem = ""
            if entry.data_offset % reader.alignment:
                problem = f"is at an offset that is no multiple of {reader.alignment}"
            elif entry.data_offset < end:
                problem = f"begins before the end of {previous}"
            if problem:
                raise UserError(f"{path} is damaged: {entry.name} {problem}; download it again")
            end, previous = entry.data_offset + entry.n_bytes, entry.name
            tensors.add(entry.name, str(path), read_later(path, entry))
        return {key: entry.contents() for key, entry in reader.fields.items()}


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what the reader raises for a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the reader checks nothing, and so fails in a dozen ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is truncated or damaged: its contents make no sense ({reason}); "
            "download it again"
        ) from error


def read_chat_template(values: Values, origin: str) -> tuple[str | None, list[str]]:
    """Return the chat template, and a note if it is not clear which one that is."""
    key = "tokenizer.chat_template"
    for name in (name for name in values if name.startswith(key)):
        require_key(values, name, str, origin)
    named = {k.removeprefix(f"{key}."): v for k, v in values.items() if k.startswith(f"{key}.")}
    return choose_template(named | ({"default": values[key]} if key in values else {}), origin)


def require_dequantizable(entry: gguf.ReaderTensor, path: Path) -> None:
    """Raise UserError if the gguf package does not dequantise the type of a tensor."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[entry.tensor_type]
    try:
        gguf.dequantize(np.zeros(n_bytes, np.uint8), entry.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"{path}: {entry.name} is stored as {entry.tensor_type.name}, "
            "which is not supported; use another quantisation"
        ) from None


def read_later(path: Path, entry: gguf.ReaderTensor) -> Callable[[], torch.Tensor]:
    """Return a function that reads a tensor in float32.

    It keeps nothing of the reader, which has an array for each token of the vocabulary. float32 is
    mapped: its pages are those of the file.
    """
    kind, shape, stored_type = entry.tensor_type, entry.data.shape, entry.data.dtype
    offset, n_bytes = entry.data_offset, entry.n_bytes

    def read() -> torch.Tensor:
        stored = np.memmap(path, np.uint8, "c", offset, (n_bytes,))  # writing would copy a page
        values = gguf.dequantize(stored.view(stored_type).reshape(shape), kind)
        return torch.from_numpy(values.astype(np.float32, copy=False))

    return read


def read_model_settings(kind: str, values: Values, origin: str) -> Values:
    """Return our model section for the keys that begin with the architecture's name."""
    keys = {ours: f"{kind}.{key}" for ours, key in SIZE_KEYS.items()}
    settings: Values = {**require_keys(values, keys, origin)}
    norm = "layer_norm_epsilon" if kind == "gpt2" else "layer_norm_rms_epsilon"
    norm_eps = require_key(values, f"{kind}.attention.{norm}", float, origin)
    settings["norm_eps"] = shortest_decimal(norm_eps)
    if kind == "gpt2":
        return GPT2_SETTINGS | settings
    settings["n_kv_heads"] = values.get(f"{kind}.attention.head_count_kv")
    settings["rope_theta"] = shortest_decimal(values.get(f"{kind}.rope.freq_base", 10_000.0))
    settings["qk_norm"] = kind == "qwen3"
    head_dim = values.get(
        f"{kind}.attention.key_length", settings["d_model"] // settings["n_heads"]
    )
    settings["head_dim"] = head_dim
    supported = {
        f"{kind}.rope.dimension_count": (head_dim,),
        f"{kind}.attention.value_length": (head_dim,),
        f"{kind}.expert_count": (0,),
    }
    require_supported(values, supported, origin)
    return settings


def read_scaling(
    kind: str, values: Values, tensors: StoredTensors, settings: Values, origin: str
) -> Values:
    """Return our settings of the scaling of RoPE. Raises UserError if it cannot be expressed.

    As in llama.cpp, a factor without a type is linear.
    """
    prefix = f"{kind}.rope.scaling"
    require_supported(values, {f"{prefix}.type": ("linear", "none", "yarn")}, origin)
    scaling_type = values.get(f"{prefix}.type", "linear")
    factor = values.get(f"{prefix}.factor") or values.get(f"{kind}.rope.scale_linear") or 1.0
    if ROPE_FACTORS in tensors:
        require_supported(values, {f"{prefix}.factor": (1.0,)}, f"{origin}, with {ROPE_FACTORS}")
        return {"rope_scaling": scaling_of_factors(tensors[ROPE_FACTORS], values, settings, origin)}
    if scaling_type == "none" or factor == 1.0:
        return {}
    scaling = {"kind": scaling_type, "factor": shortest_decimal(factor)}
    if scaling_type == "yarn":
        defaults = {f"{kind}.{key}": (value,) for key, value in YARN_DEFAULTS.items()}
        require_supported(values, defaults, origin)
        original = values.get(f"{prefix}.original_context_length") or settings["max_seq_len"]
        scaling["original_max_seq_len"] = original
    return {"rope_scaling": scaling}


def scaling_of_factors(
    factors: torch.Tensor, values: Values, settings: Values, origin: str
) -> Values | None:
    """Return the scaling that makes these factors: that of this program's file, or Llama 3's.

    None if they change nothing. Raises UserError for others.
    """
    if (factors == 1).all():
        return None
    found: Values = json.loads(values.get(ROPE_SCALING_KEY, "null"))
    found = found or LLAMA3 | {"factor": factors.max().item()}
    scaling = build_dataclass(RopeScaling, found, ("rope_scaling",), {}, origin)
    head_dim, theta = settings["head_dim"], settings["rope_theta"]
    expected = rope_factors(scaling, head_dim, theta)
    if expected.shape != factors.shape or not torch.allclose(factors, expected, rtol=1e-5):
        raise UserError(
            f"{origin}: {ROPE_FACTORS} has other factors on the frequencies of RoPE than Llama 3, "
            "which this model cannot express"
        )
    return found


def rope_factors(scaling: RopeScaling, head_dim: int, theta: float) -> torch.Tensor:
    """Return what a scaling divides each frequency by (D / 2), as llama.cpp stores it."""
    frequencies = rope_frequencies(head_dim, theta)
    return frequencies / scaling.scaled(frequencies, theta)


def unread_keys(kind: str, values: Values) -> set[str]:
    """Return the keys of the architecture and of its tokenizer that nothing here reads."""
    keys = (*SIZE_KEYS.values(), *OTHER_KEYS, *YARN_DEFAULTS)
    read = {f"{kind}.{key}" for key in keys} | TOKENIZER_KEYS
    return {key for key in values if key.startswith((f"{kind}.", KEY_PREFIX))} - read


def shortest_decimal(value: float) -> float:
    """Return the shortest decimal number with the same float32, which is what the file stores.

    >>> shortest_decimal(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value)))
