"""Checkpoints of nanoGPT (ckpt.pt) and of the Tiny Transformer Starter (Lightning).

Neither has its tokenizer. The starter names one of the Hugging Face hub. nanoGPT's rule is that a
vocabulary of GPT-2's size is GPT-2's, and another that of the characters of a text, in the order of
their code points. nanoGPT keeps the latter in a pickle, meta.pkl, which could run code; it is made
again from the text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers as hf
from tokenizers import decoders, models
from torch import Tensor

from pocketlm.conversion.huggingface import GPT2_NAMES
from pocketlm.conversion.layout import (
    GPT2_SETTINGS,
    Layout,
    Pretrained,
    Source,
    Values,
    assemble,
    require_key,
    require_keys,
    require_supported,
    resolve_tied_head,
    unread_note,
)
from pocketlm.conversion.stored import StoredTensors
from pocketlm.conversion.torch_files import add_torch_tensors, load_torch_file, require_tensors
from pocketlm.errors import UserError
from pocketlm.tokenizer.bpe import GPT2_SIZE, JsonTokenizer
from pocketlm.tokenizer.build import build_tokenizer

NANOGPT = Layout(GPT2_NAMES, "transformer.", fused=True, buffers=r".*\battn\.bias")
NANOGPT_SIZES = {
    "n_layers": "n_layer",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "max_seq_len": "block_size",
    "vocab_size": "vocab_size",
}
GPT2_SIZES = (GPT2_SIZE, 50_304)  # of nanoGPT's models with GPT-2's tokenizer; a multiple of 64

STARTER_NAMES = {
    "layers": "blocks",
    "embed_tokens": "tok_emb",
    "norm": "norm_f",
    "lm_head": "net.lm_head",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "self_attn.q_proj": "attn.Wq",
    "self_attn.k_proj": "attn.Wk",
    "self_attn.v_proj": "attn.Wv",
    "self_attn.o_proj": "attn.out",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w2",
    "mlp.down_proj": "mlp.w3",
}
STARTER = Layout(STARTER_NAMES, "net.", interleaved=True)
STARTER_SIZES = {name: name for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff")}
STARTER_READ = {*STARTER_SIZES, "rope_theta", "tie_embeddings", "swa_window"}
STARTER_NEUTRAL = {"dropout", "gradient_checkpointing", "vocab_size"}  # once it is trained

COMPILED = "_orig_mod."  # in the names of a model that torch.compile has wrapped


@dataclass(frozen=True)
class TokenizerSource:
    """Origin of the tokenizer for a file that has none."""

    data_dir: str  # cache of GPT-2's
    name: str | None = None  # as data.tokenizer; None: what the file says
    text: Path | None = None  # that a model of characters has learnt


def read_torch_checkpoint(path: Path, source: TokenizerSource) -> Pretrained:
    """Read a checkpoint of nanoGPT or of the starter. Raises UserError."""
    content = load_torch_file(path)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path} holds a {kind}; give a checkpoint of nanoGPT or of the starter")
    if "kit" in content:
        raise UserError(
            f"{path} is a checkpoint of this program; give one of nanoGPT or of the starter"
        )
    if {"model", "model_args"} <= content.keys():
        key, read = "model", read_nanogpt
    elif {"state_dict", "hyper_parameters"} <= content.keys():
        key, read = "state_dict", read_starter
    else:
        raise UserError(
            f"{path} is no checkpoint of nanoGPT (model, model_args) and none of the starter "
            f"(state_dict, hyper_parameters): it has {', '.join(map(str, list(content)[:5]))}"
        )

    def select(content: Any) -> dict[str, Tensor]:
        weights = require_tensors(content[key], path)
        return {name.replace(COMPILED, ""): tensor for name, tensor in weights.items()}

    tensors = StoredTensors()
    add_torch_tensors(tensors, path, select)
    return read(content, tensors, source, path)


def read_nanogpt(
    content: Values, tensors: StoredTensors, source: TokenizerSource, path: Path
) -> Pretrained:
    """Return a model of nanoGPT, whose GELU is exact."""
    origin = str(path)
    values = require_key(content, "model_args", dict, origin)
    settings: Values = GPT2_SETTINGS | require_keys(values, NANOGPT_SIZES, origin)
    settings |= {"mlp": "gelu_exact", "bias": require_key(values, "bias", bool, origin)}
    settings["tie_embeddings"], notes = resolve_tied_head(tensors, NANOGPT, True, origin)
    notes += unread_note(values.keys() - {*NANOGPT_SIZES.values(), "bias", "dropout"}, origin)
    tokenizer = nanogpt_tokenizer(settings["vocab_size"], source, path)
    return assemble(Source(origin, settings, tokenizer, None, tuple(notes)), tensors, NANOGPT)


def nanogpt_tokenizer(size: int, source: TokenizerSource, path: Path) -> JsonTokenizer:
    """Return the tokenizer that is asked for, or that nanoGPT takes for a vocabulary of this size.

    Raises UserError.
    """
    if source.text is not None:
        return characters_of(source.text, size, path)
    if source.name is None and size not in GPT2_SIZES:
        raise UserError(
            f"{path} has a vocabulary of {size:,} tokens and no tokenizer (a meta.pkl is not read, "
            "as a pickle can run code); pass --text FILE, the text whose characters they are, or "
            "--tokenizer NAME"
        )
    return named_tokenizer(source.name or "gpt2", source)


def named_tokenizer(name: str, source: TokenizerSource) -> JsonTokenizer:
    """Return the tokenizer of this name. Raises UserError if it is made from a text."""
    tokenizer = build_tokenizer(name, source.data_dir)
    if not isinstance(tokenizer, JsonTokenizer):
        raise UserError(
            f"--tokenizer {name} is made from a text; for a model of characters, pass --text FILE "
            "instead; else give gpt2, a tokenizer.json or a name on the Hugging Face hub"
        )
    return tokenizer


def characters_of(text: Path, size: int, path: Path) -> JsonTokenizer:
    """Return the tokenizer of the characters of a text, in the order of their code points.

    Raises UserError if they are not as many as the model's tokens.
    """
    try:
        symbols = sorted(set(text.read_text(encoding="utf-8")))  # "\n" for "\r\n", as in nanoGPT
    except UnicodeDecodeError as error:
        raise UserError(f"{text} is not UTF-8 at byte {error.start}") from None
    if len(symbols) != size:
        raise UserError(
            f"{text} has {len(symbols):,} different characters and {path} {size:,} tokens; "
            "pass the text that the model was trained on"
        )
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    backend = hf.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    return JsonTokenizer(backend.to_str(), str(path), None, None)


def read_starter(
    content: Values, tensors: StoredTensors, source: TokenizerSource, path: Path
) -> Pretrained:
    """Return a model of the Tiny Transformer Starter, whose RoPE rotates neighbours."""
    origin = str(path)
    values = require_key(content, "hyper_parameters", dict, origin)
    model, data, training = (
        require_key(values, key, dict, origin) for key in ("model", "data", "training")
    )
    settings: Values = {**require_keys(model, STARTER_SIZES, origin)}
    settings["max_seq_len"] = require_key(training, "seq_len", int, origin)
    settings["rope_theta"] = model.get("rope_theta")
    require_supported(model, {"swa_window": (0,)}, origin)
    tied = require_key(model, "tie_embeddings", bool, origin)
    settings["tie_embeddings"], notes = resolve_tied_head(tensors, STARTER, tied, origin)
    notes += unread_note(model.keys() - STARTER_READ - STARTER_NEUTRAL, origin)
    embedding = STARTER.foreign_name("embed_tokens.weight")
    if embedding in tensors:  # a missing one is reported later
        settings["vocab_size"] = len(tensors[embedding])
    name = source.name or require_key(data, "tokenizer_name", str, origin)
    tokenizer = named_tokenizer(name, source)
    settings.setdefault("vocab_size", tokenizer.vocab_size)
    return assemble(Source(origin, settings, tokenizer, None, tuple(notes)), tensors, STARTER)
