"""A checkpoint as a Hugging Face folder, which AutoModelForCausalLM and AutoTokenizer load."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from model import ModelConfig
from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.loading import build_section
from pocketlm.conversion.huggingface import LAYOUTS, ORIGINAL_KEY, ROPE_OPTIONS, SETTINGS
from pocketlm.errors import UserError
from pocketlm.export.model_card import model_card, picture_of
from pocketlm.export.proof import Reference, ids_of_texts, refuse_different, require_parity
from pocketlm.export.tensors import ForeignTensor, foreign_tensors, in_shards, write_safetensors
from pocketlm.export.tokenizers import LibraryTokenizer, library_tokenizer
from pocketlm.export.transformers_check import Check
from pocketlm.files import atomic_folder
from pocketlm.tokenizer.base import Tokenizer

MAX_SHARD_BYTES = 5 * 10**9  # of one file of weights
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ROOT = Path(__file__).parents[2]

# fields of ModelConfig that only training uses
TRAINING_FIELDS = {"init_std", "dropout", "gradient_checkpointing"}


@dataclass(frozen=True)
class ModelClass:
    """A class of transformers, and the config.json that it would have for a model."""

    name: str
    config: dict[str, Any]
    differing: tuple[str, ...]  # fields of the model that the class does not express


def llama_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **llama_keys(config),
        "attention_bias": config.attention_bias == "all",
        "mlp_bias": config.bias,
    }


def mistral_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **llama_keys(config),
        "sliding_window": None,
    }


def qwen2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **llama_keys(config),
        "use_sliding_window": False,
    }


def qwen3_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **llama_keys(config),
        "attention_bias": config.attention_bias == "all",
        "use_sliding_window": False,
    }


def llama_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that Llama and its relatives share."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        **rope_keys(config),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "dtype": "float32",
    }


def rope_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of RoPE: rope_parameters, and the two of transformers 4, which lacks it."""
    scaling = config.rope_scaling
    options: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default"}
    if scaling is not None:
        values = {name: getattr(scaling, name) for name in ROPE_OPTIONS[scaling.kind]}
        options |= {name: value for name, value in values.items() if value is not True}
        if scaling.original_max_seq_len is not None:
            options[ORIGINAL_KEY] = scaling.original_max_seq_len
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": options if scaling else None,
        "rope_parameters": options | {"rope_theta": config.rope_theta},
    }


def gpt2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_positions": config.max_seq_len,
        "activation_function": "gelu" if config.mlp == "gelu_exact" else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "dtype": "float32",
    }


CONFIGS = {
    "llama": llama_config,
    "mistral": mistral_config,
    "qwen2": qwen2_config,
    "qwen3": qwen3_config,
    "gpt2": gpt2_config,
}


def model_classes(config: ModelConfig) -> list[ModelClass]:
    """Return the known classes, the most suitable first.

    A class expresses a model if our reader makes the same ModelConfig of its config.json.
    """
    classes = []
    for kind, make_config in CONFIGS.items():
        values = make_config(config)
        read = build_section("model", SETTINGS[kind](values, kind), {}, kind)
        names = [field.name for field in fields(ModelConfig)]
        differing = [
            name
            for name in names
            if name not in TRAINING_FIELDS and getattr(read, name) != getattr(config, name)
        ]
        if kind in ("llama", "gpt2") and config.d_model % config.n_heads:
            differing.append("d_model")  # transformers refuses what n_heads does not divide
        classes.append(ModelClass(values["architectures"][0], values, tuple(differing)))
    return sorted(classes, key=lambda each: len(each.differing))


def suitable_class(config: ModelConfig, origin: str) -> ModelClass:
    """Return the class that expresses a model. Raises UserError if there is none."""
    nearest = model_classes(config)[0]
    if not nearest.differing:
        return nearest
    listed = ", ".join(f"{name} {getattr(config, name)!r}" for name in nearest.differing)
    others = "safetensors" if config.token_shift else "onnx or safetensors"
    raise UserError(
        f"{origin} is a model that no class of transformers expresses; it differs from the "
        f"nearest, {nearest.name}, by {listed}; convert it to {others}"
    )


def write_folder(checkpoint: Checkpoint, reference: Reference, folder: Path) -> list[str]:
    """Write a new folder and load it in a new process; return the lines of its proof.

    Raises UserError if no class expresses the model or if it does not compute the same; there is
    then no folder.
    """
    origin = str(checkpoint.path)
    chosen = suitable_class(checkpoint.model.config, origin)
    tokenizer = library_tokenizer(checkpoint.tokenizer)
    with atomic_folder(folder) as unfinished:
        layout = LAYOUTS[chosen.config["model_type"]]
        write_weights(foreign_tensors(checkpoint.model, layout), unfinished)
        checkpoint.free_weights()
        special = generation_values(tokenizer)
        write_json(chosen.config | special, unfinished / "config.json")
        write_json(special, unfinished / "generation_config.json")
        write_tokenizer(tokenizer, checkpoint, unfinished)
        card = model_card(checkpoint, chosen.name, folder.name)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        if (picture := picture_of(checkpoint)) is not None:
            (unfinished / "loss.png").write_bytes(picture.read_bytes())
        check = check_in_new_process(unfinished, reference, checkpoint.tokenizer)
        require_parity(check.parity, reference)
        if check.different_texts and chosen.name == "Qwen2ForCausalLM":
            raise UserError(
                f"{origin} has biases as Qwen2's, and AutoTokenizer splits the texts of every "
                "Qwen2 as Qwen's tokenizer does, which is not this one's way; convert it to onnx "
                "or safetensors"
            )
        refuse_different(check.different_texts)
    return [
        f"{chosen.name} in a new process: {check.parity}",
        f"AutoTokenizer in a new process: the same ids for {check.n_texts} texts",
    ]


def write_weights(tensors: list[ForeignTensor], folder: Path) -> None:
    """Write one safetensors file, or several with an index."""
    shards = in_shards(tensors, MAX_SHARD_BYTES)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE_FILE, tensors, {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, {"format": "pt"})
        weight_map |= {tensor.name: name for tensor in shard}
    size = sum(tensor.n_bytes for tensor in tensors)
    write_json({"metadata": {"total_size": size}, "weight_map": weight_map}, folder / INDEX_FILE)


def generation_values(tokenizer: LibraryTokenizer) -> dict[str, Any]:
    """Return the ids that begin and end a text; each of several ends one."""
    ends = [i for i in (tokenizer.eos_id, *tokenizer.end_ids) if i is not None]
    values = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.ids.get(tokenizer.names.get("pad_token", "")),
    }
    return {name: value for name, value in values.items() if value is not None}


def write_tokenizer(tokenizer: LibraryTokenizer, checkpoint: Checkpoint, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template.

    Without a chat template, text is never read as a special token, as in our tokenizers. With one,
    it must be, because transformers encodes the text that the template makes.
    """
    template = checkpoint.chat_template
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.model.max_seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": template is None,
        **tokenizer.names,
        **({} if tokenizer.adds_bos else {"add_bos_token": False}),
    }
    (folder / "tokenizer.json").write_text(tokenizer.json_text, encoding="utf-8")
    write_json(config, folder / "tokenizer_config.json")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(values: dict[str, Any], path: Path) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


# ---- the proof ----


def check_in_new_process(folder: Path, reference: Reference, tokenizer: Tokenizer) -> Check:
    """Load the folder with the classes of transformers, in a process without our model."""
    texts = ids_of_texts(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "reference.npz"
        np.savez(
            file,
            ids=reference.ids,
            logits=reference.logits,
            greedy=reference.greedy,
            texts=json.dumps(texts),
        )
        module = "pocketlm.export.transformers_check"
        command = [sys.executable, "-P", "-m", module, str(folder), str(file)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise UserError(
            f"transformers cannot load the converted model: {reason}; nothing was written. "
            "Please report this as a bug"
        )
    return Check.from_json(done.stdout)
