"""Pretrained models in a Hugging Face folder, as `save_pretrained` writes it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

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
from pocketlm.hub.special_tokens import read_json_object
from pocketlm.tokenizer.bpe import JsonTokenizer

GPT2_NAMES = {
    "layers": "h",
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}

LAYOUTS = {
    "llama": Layout({}, "model.", buffers=r".*\brotary_emb\.inv_freq"),
    "gpt2": Layout(
        GPT2_NAMES,
        "transformer.",
        transposed=True,
        fused=True,
        buffers=r".*\bh\.\d+\.attn\.(masked_)?bias",
    ),
}

# keys of config.json by our names
LLAMA_KEYS = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
GPT2_KEYS = {
    "n_layers": "n_layer",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "max_seq_len": "n_positions",
    "vocab_size": "vocab_size",
}

# defaults of LlamaConfig and GPT2Config in transformers
LLAMA_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
GPT2_DEFAULTS = {
    "n_positions": 1024,
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}

# keys that do not change what the model computes from a text, or are read elsewhere
NEUTRAL_KEYS = frozenset(
    (
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "n_ctx",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
LLAMA_READ = (
    frozenset(LLAMA_KEYS.values())
    | LLAMA_DEFAULTS.keys()
    | {
        "head_dim",
        "hidden_act",
        "num_key_value_heads",
        "quantization_config",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
    }
)

ROPE_SUPPORTED = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1.0,),
}
GPT2_SUPPORTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "add_cross_attention": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
}


def llama_settings(values: Values, origin: str) -> Values:
    """Return our model section for the values of a LlamaConfig."""
    values = LLAMA_DEFAULTS | values
    sizes = require_keys(values, LLAMA_KEYS, origin)
    rope_key, rope = read_rope(values, origin)
    head_dim = sizes["d_model"] // sizes["n_heads"]
    require_supported(values, {"hidden_act": ("silu",), "head_dim": (head_dim, None)}, origin)
    bias = values["attention_bias"]
    where = f"{origin}, where attention_bias is {bias}"
    require_supported(values, {"mlp_bias": (bias,)}, where)
    require_supported(rope, ROPE_SUPPORTED, f"{origin}: {rope_key}")
    return sizes | {
        "n_kv_heads": values.get("num_key_value_heads"),
        "bias": bias,
        "rope_theta": rope["rope_theta"],
        "norm_eps": values["rms_norm_eps"],
        "tie_embeddings": values["tie_word_embeddings"],
    }


def read_rope(values: Values, origin: str) -> tuple[str, Values]:
    """Return the key of config.json that has the options of RoPE, and the options."""
    rope: Values = {"rope_theta": values.get("rope_theta", 10_000.0)}
    for key in ("rope_parameters", "rope_scaling"):
        if values.get(key):
            return key, rope | require_key(values, key, dict, origin)
    return "rope_theta", rope


def gpt2_settings(values: Values, origin: str) -> Values:
    """Return our model section for the values of a GPT2Config."""
    values = GPT2_DEFAULTS | values
    require_supported(values, GPT2_SUPPORTED, origin)
    sizes = require_keys(values, GPT2_KEYS, origin)
    return (
        GPT2_SETTINGS
        | sizes
        | {
            "d_ff": values["n_inner"],
            "norm_eps": values["layer_norm_epsilon"],
            "tie_embeddings": values["tie_word_embeddings"],
        }
    )


READ_KEYS = {
    "llama": NEUTRAL_KEYS | LLAMA_READ,
    "gpt2": NEUTRAL_KEYS | {*GPT2_KEYS.values()} | GPT2_DEFAULTS.keys() | GPT2_SUPPORTED.keys(),
}

SETTINGS: dict[str, Callable[[Values, str], Values]] = {
    "llama": llama_settings,
    "gpt2": gpt2_settings,
}


def read_safetensors(folder: Path) -> Tensors:
    """Return the tensors of model.safetensors, or of the files that its index lists."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        weight_map = require_key(read_json_object(index), "weight_map", dict, str(index))
        names = sorted({str(name) for name in weight_map.values()}) or names
    tensors: Tensors = {}
    for file in (folder / name for name in names):
        if not file.is_file():
            hint = ""
            if any(folder.glob("*.bin")):
                hint = " (a pytorch_model.bin is not read: save the model again, as safetensors)"
            raise UserError(f"there is no {file}{hint}; download or save the model again")
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise UserError(
                f"{file} is damaged or not a safetensors file ({error}); "
                "download or save the model again"
            ) from None
    return tensors


def read_folder(folder: Path) -> Pretrained:
    """Read a Llama or GPT-2: config.json, safetensors, tokenizer.json. Raises UserError."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    values, origin = read_json_object(file), str(file)
    kind = values.get("model_type")
    if kind not in SETTINGS:
        supported = " and ".join(SETTINGS)
        raise UserError(f"{file} is of a model of type {kind!r}; only {supported} can be converted")
    require_supported(values, {"quantization_config": (None,)}, origin)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; save its fast tokenizer in it")
    settings, tensors = SETTINGS[kind](values, origin), read_safetensors(folder)
    layout = LAYOUTS[kind]
    if not any(name.startswith(layout.prefix) for name in tensors):
        layout = replace(layout, prefix="")
    settings["tie_embeddings"], notes = resolve_tied_head(
        tensors, layout, bool(settings["tie_embeddings"]), str(folder)
    )
    tokenizer = JsonTokenizer.from_file(folder)
    template, template_notes = read_chat_template(folder)
    notes += [*unread_note(values.keys() - READ_KEYS[kind], origin), *template_notes]
    source = Source(str(folder), settings, tokenizer, template, tuple(notes))
    return assemble(source, tensors, layout)


def read_chat_template(folder: Path) -> tuple[str | None, list[str]]:
    """Return the chat template, and notes.

    Files of templates go before the key of tokenizer_config.json, as in transformers; each may hold
    several templates by name.
    """
    templates: dict[str, str] = {}
    file = folder / "chat_template.jinja"
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        value = read_json_object(folder / name).get("chat_template")
        if value and not templates:
            templates = by_name(value, folder / name)
    return choose_template(templates, str(folder))


def by_name(value: Any, file: Path) -> dict[str, str]:
    """Return the templates by name of a key that holds one or a list of them."""
    if isinstance(value, str):
        return {"default": value}
    try:
        return {str(each["name"]): str(each["template"]) for each in value}
    except (TypeError, KeyError):
        raise UserError(
            f"{file}: chat_template is neither a template nor a list of named ones"
        ) from None
