"""Pretrained models in a Hugging Face folder, as `save_pretrained` writes it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketlm.conversion.folder_weights import read_weights
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
from pocketlm.errors import UserError
from pocketlm.hub.special_tokens import read_json_object
from pocketlm.model.rope import OPTIONS, yarn_attention_factor
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

LLAMA_LAYOUT = Layout({}, "model.", buffers=r".*\brotary_emb\.inv_freq")
LAYOUTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA_LAYOUT),
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

# keys that the configs of Llama and of its relatives have, with the defaults of transformers
LLAMA_DEFAULTS = {
    "llama": {
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "head_dim": None,
        "sliding_window": 4096,
    },
    "qwen2": {
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 32,
        "head_dim": None,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
}
LLAMA_DEFAULTS["qwen3"] = LLAMA_DEFAULTS["qwen2"] | {"head_dim": 128, "attention_bias": False}
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
        "is_llama_config",
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
        "transformers.js_config",
        "transformers_version",
        "use_cache",
    )
)
# what only one value of can be expressed; the first is the default
LLAMA_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "partial_rotary_factor": (None, 1.0),
}
LLAMA_READ = {
    *LLAMA_KEYS.values(),
    *LLAMA_SUPPORTED,
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
}

# options of each kind of RoPE, which RopeScaling has by the same names
ROPE_OPTIONS: dict[str, tuple[str, ...]] = {
    "default": (),
    **{
        kind: ("factor", *(name for name in names if name != "original_max_seq_len"))
        for kind, names in OPTIONS.items()
    },
}
ROPE_REQUIRED = ROPE_OPTIONS | {"yarn": ()}
ORIGINAL_KEY = "original_max_position_embeddings"
ROPE_READ = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
    *(ORIGINAL_KEY, "mscale", "mscale_all_dim"),
    *(option for options in ROPE_OPTIONS.values() for option in options),
}
GPT2_SUPPORTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),  # the last is exact
    "scale_attn_weights": (True,),
    "add_cross_attention": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
}


# keys that are true or false
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")


def llama_settings(values: Values, origin: str) -> Values:
    """Return our model section for the values of the config of Llama or of a relative."""
    kind = values.get("model_type", "llama")
    values = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False} | LLAMA_DEFAULTS[kind] | values
    sizes = require_keys(values, LLAMA_KEYS, origin)
    require_supported(values, LLAMA_SUPPORTED, origin)
    if kind != "llama":  # which has no such key
        require_full_attention(values, origin)
    in_attention = "all" if values.get("attention_bias") else "none"
    return (
        sizes
        | read_rope(values, origin)
        | {
            "n_kv_heads": values["num_key_value_heads"],
            "head_dim": sizes["d_model"] // sizes["n_heads"]
            if values["head_dim"] is None
            else values["head_dim"],
            "attention_bias": {"mistral": "none", "qwen2": "qkv"}.get(kind, in_attention),
            "bias": values.get("mlp_bias", False) if kind == "llama" else False,
            "qk_norm": kind == "qwen3",
            "norm_eps": values["rms_norm_eps"],
            "tie_embeddings": values["tie_word_embeddings"],
        }
    )


def require_full_attention(values: Values, origin: str) -> None:
    """Raise UserError if a sliding window hides tokens of the context from some layer.

    A token sees as many tokens as the window has, itself among them.
    """
    context, window = values["max_position_embeddings"], values.get("sliding_window")
    if window is None:
        return
    if "layer_types" in values:  # Qwen
        kinds = dict.fromkeys(values["layer_types"] or ())
        require_supported(
            {f"layer type {kind}": kind for kind in kinds},
            {f"layer type {kind}": ("full_attention", "sliding_attention") for kind in kinds},
            origin,
        )
        below_the_top = values["max_window_layers"] < values["num_hidden_layers"]
        sliding = values["use_sliding_window"] and below_the_top
        if not ("sliding_attention" in kinds if kinds else sliding):
            return
    if require_key(values, "sliding_window", int, origin) < context:
        raise UserError(
            f"{origin}: sliding_window is {window}, and this model's attention covers the whole "
            f"context; it must be null, or at least max_position_embeddings, {context}"
        )


def read_rope(values: Values, origin: str) -> Values:
    """Return our settings of RoPE. Raises UserError for a kind that model.py does not have.

    As in transformers, rope_scaling goes before rope_parameters, and what either says before the
    keys beside it; but for the context of pretraining, which is first read beside them.
    """
    given = {
        key: require_key(values, key, dict, origin)
        for key in ("rope_parameters", "rope_scaling")
        if values.get(key) is not None
    }
    key = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    options = given.get(key, {})
    where = f"{origin}: {key}"
    type_key = "rope_type" if "rope_type" in options else "type"
    choices = {type_key: tuple(ROPE_OPTIONS), "partial_rotary_factor": (None, 1.0)}
    by_layer = {name: (None,) for name, each in options.items() if isinstance(each, dict)}
    require_supported(options, choices | by_layer, where)
    kind = options.get(type_key, "default")
    scaling: Values = {name: options[name] for name in ROPE_OPTIONS[kind] if name in options}
    if kind in ("llama3", "yarn"):
        places = (values, options, {ORIGINAL_KEY: values["max_position_embeddings"]})
        scaling["original_max_seq_len"] = next(
            place[ORIGINAL_KEY] for place in places if place.get(ORIGINAL_KEY)
        )
    if kind == "yarn":
        scaling = complete_yarn(scaling, options, values["max_position_embeddings"], where)
    if missing := [name for name in ROPE_REQUIRED[kind] if scaling.get(name) is None]:
        raise UserError(f"{where} has no {missing[0]}, which {kind!r} needs; download it again")
    return {
        "rope_theta": options.get("rope_theta", values.get("rope_theta", 10_000.0)),
        "rope_scaling": {"kind": kind, **scaling} if scaling else None,
    }


def complete_yarn(scaling: Values, options: Values, context: int, where: str) -> Values:
    """Return the scaling of YaRN with what transformers derives from other options."""
    scaling = {name: value for name, value in scaling.items() if value is not None}
    if "factor" not in scaling:
        scaling["factor"] = context / scaling["original_max_seq_len"]
    names = ("mscale", "mscale_all_dim")
    if "attention_factor" not in scaling and all(options.get(name) for name in names):
        factor = require_key(scaling, "factor", float, where)
        above, below = (
            yarn_attention_factor(factor, require_key(options, name, float, where))
            for name in names
        )
        scaling["attention_factor"] = above / below
    return scaling


def gpt2_settings(values: Values, origin: str) -> Values:
    """Return our model section for the values of a GPT2Config."""
    values = {**GPT2_DEFAULTS, **values}
    require_supported(values, GPT2_SUPPORTED, origin)
    sizes = require_keys(values, GPT2_KEYS, origin)
    return (
        GPT2_SETTINGS
        | sizes
        | {
            "d_ff": values["n_inner"],
            "mlp": "gelu_exact" if values.get("activation_function") == "gelu" else "gelu",
            "head_dim": sizes["d_model"] // sizes["n_heads"],
            "norm_eps": values["layer_norm_epsilon"],
            "tie_embeddings": values["tie_word_embeddings"],
        }
    )


READ_KEYS = {
    **{kind: NEUTRAL_KEYS | LLAMA_READ | LLAMA_DEFAULTS[kind].keys() for kind in LLAMA_DEFAULTS},
    "gpt2": NEUTRAL_KEYS | {*GPT2_KEYS.values()} | GPT2_DEFAULTS.keys() | GPT2_SUPPORTED.keys(),
}

SETTINGS: dict[str, Callable[[Values, str], Values]] = {
    **dict.fromkeys(LLAMA_DEFAULTS, llama_settings),
    "gpt2": gpt2_settings,
}


def read_folder(folder: Path) -> Pretrained:
    """Read a model of one of SETTINGS: config.json, weights, tokenizer.json. Raises UserError."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    values, origin = read_json_object(file), str(file)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in SETTINGS:
        raise UserError(
            f"{file} is of a model of type {kind!r}; those that can be converted are "
            f"{', '.join(SETTINGS)}"
        )
    require_supported(values, {"quantization_config": (None,)}, origin)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; save its fast tokenizer in it")
    for key in FLAGS:
        if values.get(key) is not None:
            require_key(values, key, bool, origin)
    settings, tensors = SETTINGS[kind](values, origin), read_weights(folder)
    layout = LAYOUTS[kind]
    if not any(name.startswith(layout.prefix) for name in tensors):
        layout = replace(layout, prefix="")
    settings["tie_embeddings"], notes = resolve_tied_head(
        tensors, layout, bool(settings["tie_embeddings"]), str(folder)
    )
    tokenizer = JsonTokenizer.from_file(folder)
    template, template_notes = read_chat_template(folder)
    notes += [*unread_note(unread_keys(kind, values), origin), *template_notes]
    source = Source(str(folder), settings, tokenizer, template, tuple(notes))
    return assemble(source, tensors, layout)


def unread_keys(kind: str, values: Values) -> set[str]:
    """Return the keys of config.json, and those of its options of RoPE, that nothing here reads."""
    found = values.keys() - READ_KEYS[kind]
    for key in {"rope_scaling", "rope_parameters"} - found:
        found |= {f"{key}.{name}" for name in (values.get(key) or {}).keys() - ROPE_READ}
    return found


def read_chat_template(folder: Path) -> tuple[str | None, list[str]]:
    """Return the chat template, and notes.

    Files of templates go before the key of tokenizer_config.json, as in transformers; each may hold
    several templates by name.
    """
    templates: dict[str, str] = {}
    file = folder / "chat_template.jinja"
    if file.is_file():
        templates["default"] = read_text(file)
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = read_text(file)
    for name in ("tokenizer_config.json", "chat_template.json"):
        value = read_json_object(folder / name).get("chat_template")
        if value and not templates:
            templates = by_name(value, folder / name)
    return choose_template(templates, str(folder))


def read_text(file: Path) -> str:
    """Return the text of a file. Raises UserError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 at byte {error.start}; download it again") from None


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
