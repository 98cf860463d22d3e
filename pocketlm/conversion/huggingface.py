"""Reading a Hugging Face folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from pocketlm.conversion.layout import (
    OF_GPT2,
    Layout,
    Pretrained,
    Tensors,
    Values,
    assemble,
    drop_second_copy,
    require_key,
    require_supported,
)
from pocketlm.errors import UserError
from pocketlm.tokenizer.bpe import JsonTokenizer

GPT2_NAMES = {
    "layers": "h", "embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
    **{f"self_attn.{part}_proj": "attn.c_attn" for part in "qkv"},
}  # fmt: skip


HUGGING_FACE = {
    "llama": Layout({}, "model.", buffers=r".*\brotary_emb\.inv_freq"),
    "gpt2": Layout(
        GPT2_NAMES,
        "transformer.",
        transposed=True,
        fused=True,
        buffers=r".*\bh\.\d+\.attn\.(masked_)?bias",
    ),
}


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def llama_settings(values: Values, origin: str) -> Values:
    """Our model section of Hugging Face's LlamaConfig, whose defaults these are."""
    usual = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    values = usual | {"attention_bias": False, "mlp_bias": False} | values
    keys = {
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
    }
    keys |= {"max_seq_len": "max_position_embeddings", "vocab_size": "vocab_size"}
    settings = {ours: require_key(values, key, int, origin) for ours, key in keys.items()}
    key = next((key for key in ("rope_parameters", "rope_scaling") if values.get(key)), None)
    rope = {"rope_theta": values.get("rope_theta", 10_000.0)} | (
        require_key(values, key, dict, origin) if key else {}
    )
    require_supported(
        values,
        origin,
        {"hidden_act": ("silu",), "head_dim": (settings["d_model"] // settings["n_heads"], None)},
    )
    require_supported(
        values,
        f"{origin}, where attention_bias is {values['attention_bias']}",
        {"mlp_bias": (values["attention_bias"],)},
    )
    require_supported(
        rope,
        f"{origin}: {key}",
        {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,)},
    )
    others = {
        "n_kv_heads": values.get("num_key_value_heads"),
        "bias": values["attention_bias"],
        "rope_theta": rope["rope_theta"],
    }
    return (
        settings
        | others
        | {"norm_eps": values["rms_norm_eps"], "tie_embeddings": values["tie_word_embeddings"]}
    )


def gpt2_settings(values: Values, origin: str) -> Values:
    """Our model section of Hugging Face's GPT2Config, whose defaults these are."""
    values = {
        "n_positions": 1024,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    } | values
    known = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "add_cross_attention": (False,),
    }
    require_supported(
        values,
        origin,
        known | {"scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,)},
    )
    keys = {
        "n_layers": "n_layer",
        "d_model": "n_embd",
        "n_heads": "n_head",
        "max_seq_len": "n_positions",
        "vocab_size": "vocab_size",
    }
    settings = {ours: require_key(values, key, int, origin) for ours, key in keys.items()}
    others = {
        "d_ff": values["n_inner"],
        "norm_eps": values["layer_norm_epsilon"],
        "tie_embeddings": values["tie_word_embeddings"],
    }
    return OF_GPT2 | settings | others


SETTINGS: dict[str, Callable[[Values, str], Values]] = {
    "llama": llama_settings,
    "gpt2": gpt2_settings,
}


def read_json(path: Path) -> Values:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values


def read_safetensors(folder: Path) -> Tensors:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json lists."""
    index = folder / "model.safetensors.index.json"
    listed = (
        require_key(read_json(index), "weight_map", dict, str(index)) if index.is_file() else {}
    )
    tensors: Tensors = {}
    for file in sorted({folder / str(name) for name in listed.values()}) or [
        folder / "model.safetensors"
    ]:
        if not file.is_file():
            old = (
                " (a pytorch_model.bin is not read: save the model again, as safetensors)"
                if [*folder.glob("*.bin")]
                else ""
            )
            raise UserError(f"there is no {file}{old}; fetch or save the model again")
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise UserError(
                f"{file} is damaged or not a safetensors file ({error}); fetch or save the model again"
            ) from None
    return tensors


def read_folder(folder: Path) -> Pretrained:
    """A Llama or GPT-2 as `save_pretrained` writes it: config.json, safetensors, tokenizer.json."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    values, origin = read_json(file), str(file)
    if (kind := values.get("model_type")) not in SETTINGS:
        raise UserError(
            f"{file} is of a model of the type {kind!r}; {' and '.join(SETTINGS)} can be converted"
        )
    require_supported(values, origin, {"quantization_config": (None,)})
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; save its tokenizer there, as a fast one")
    settings, tensors = SETTINGS[kind](values, origin), read_safetensors(folder)
    layout = HUGGING_FACE[kind]
    if not any(name.startswith(layout.prefix) for name in tensors):
        layout = replace(layout, prefix="")
    if settings["tie_embeddings"]:
        drop_second_copy(tensors, layout.name("lm_head.weight"), layout.name("embed_tokens.weight"))
    return assemble(
        settings,
        tensors,
        layout,
        JsonTokenizer.from_file(folder),
        folder_template(folder),
        str(folder),
    )


def folder_template(folder: Path) -> str | None:
    """The chat template beside the tokenizer: a file of its own, or in tokenizer_config.json, there perhaps one of several."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    template = read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template
