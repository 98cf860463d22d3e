"""GGUF, llama.cpp's file of a whole model: keys, tokenizer, and tensors, quantised or not."""

from pathlib import Path

import gguf
import numpy as np
import tokenizers as hf
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pocketlm.conversion.layout import (
    OF_GPT2,
    Layout,
    Pretrained,
    Values,
    assemble,
    drop_second_copy,
    require_key,
    require_supported,
)
from pocketlm.errors import UserError
from pocketlm.tokenizer.bpe import JsonTokenizer, byte_level

GGUF_NAMES = {
    "layers": "blk", "embed_tokens": "token_embd", "embed_positions": "position_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}  # fmt: skip


GGUF = {
    "llama": Layout(GGUF_NAMES, interleaved=True),
    "gpt2": Layout(
        GGUF_NAMES | {f"self_attn.{part}_proj": "attn_qkv" for part in "qkv"}, fused=True
    ),
}


def read_gguf(path: Path, name: str) -> Pretrained:
    """A Llama or GPT-2 as llama.cpp stores it: keys, tokenizer and tensors, quantised or not, in one file."""
    try:
        reader = gguf.GGUFReader(path)
        values = {key: entry.contents() for key, entry in reader.fields.items()}
        kind = values.get("general.architecture")
        if kind not in GGUF:
            raise UserError(
                f"{path} is of a model of the type {kind!r}; {' and '.join(GGUF)} can be converted"
            )
        layout, tensors, settings = GGUF[kind], {}, gguf_settings(kind, values, str(path))
        tokenizer = gguf_tokenizer(values, name, str(path))
        for entry in reader.tensors:
            tensors[entry.name] = torch.from_numpy(
                np.array(gguf.dequantize(entry.data, entry.tensor_type), np.float32)
            )
    except UserError:
        raise
    except NotImplementedError:
        raise UserError(
            f"{path}: {entry.name} is stored as {entry.tensor_type.name}, which is not read; quantise it otherwise"
        ) from None
    except (
        Exception
    ) as error:  # the reader takes whatever it is given for whole, and so fails in a dozen ways
        raise UserError(
            f"{path} is truncated or damaged: what is read of it makes no sense ({error}); fetch it again"
        ) from error
    embedding, head = layout.name("embed_tokens.weight"), layout.name("lm_head.weight")
    settings["tie_embeddings"] = drop_second_copy(tensors, head, embedding)
    settings["bias"] = layout.name("layers.0.self_attn.q_proj.bias") in tensors
    settings["vocab_size"] = len(tensors.get(embedding, tokenizer.vocab_size * [0]))
    return assemble(
        settings, tensors, layout, tokenizer, values.get("tokenizer.chat_template"), str(path)
    )


def gguf_settings(kind: str, values: Values, origin: str) -> Values:
    """Our model section of the keys that begin with the architecture's name."""
    keys = {
        "n_layers": "block_count",
        "d_model": "embedding_length",
        "d_ff": "feed_forward_length",
        "max_seq_len": "context_length",
    }
    norm = "layer_norm_rms_epsilon" if kind == "llama" else "layer_norm_epsilon"
    keys |= {"n_heads": "attention.head_count"}
    settings = {
        ours: require_key(values, f"{kind}.{key}", int, origin) for ours, key in keys.items()
    }
    settings["norm_eps"] = shortest(require_key(values, f"{kind}.attention.{norm}", float, origin))
    if kind == "gpt2":
        return OF_GPT2 | settings
    settings["n_kv_heads"] = values.get("llama.attention.head_count_kv")
    settings["rope_theta"] = shortest(values.get("llama.rope.freq_base", 10_000.0))
    head_dim = settings["d_model"] // settings["n_heads"]
    known = {
        key: (head_dim,)
        for key in ("rope.dimension_count", "attention.key_length", "attention.value_length")
    }
    known |= {"rope.scaling.type": ("none",), "rope.scale_linear": (1.0,), "expert_count": (0,)}
    require_supported(values, origin, {f"llama.{key}": value for key, value in known.items()})
    return settings


def shortest(value: float) -> float:
    """The shortest decimal number that is the same in float32, as which the file holds it: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


SPLITTERS = {  # llama.cpp's name: what splits a text before the merges
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(hf.Regex(LLAMA3_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


NORMAL, CONTROL, USER_DEFINED = (
    gguf.TokenType[name] for name in ("NORMAL", "CONTROL", "USER_DEFINED")
)


def gguf_tokenizer(values: Values, name: str, origin: str) -> JsonTokenizer:
    """The tokenizer that the keys `tokenizer.ggml.*` describe."""
    about = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in values.items()
        if key.startswith("tokenizer.ggml.")
    }
    tokens = require_key(about, "tokens", list, origin)
    kinds = about.get("token_type") or [NORMAL] * len(tokens)
    builders = {"gpt2": byte_level_bpe, "llama": sentencepiece_bpe}
    if about.get("model") not in builders:
        raise UserError(
            f"{origin} has a tokenizer of the type {about.get('model')!r}; {' and '.join(builders)} can be converted"
        )
    backend = builders[about["model"]](about, tokens, kinds, origin)
    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        add(
            [
                hf.AddedToken(token, normalized=False)
                for token, its_kind in zip(tokens, kinds, strict=True)
                if its_kind == kind
            ]
        )
    return JsonTokenizer(
        backend.to_str(), name, about.get("bos_token_id"), about.get("eos_token_id")
    )


def byte_level_bpe(about: Values, tokens: list[str], kinds: list[int], origin: str) -> hf.Tokenizer:
    """GPT-2's way, with the splitting that the file names."""
    if (splitter := about.get("pre")) not in SPLITTERS:
        raise UserError(
            f"{origin} splits text in the way {splitter!r}; {', '.join(SPLITTERS)} can be converted"
        )
    merges = [tuple(merge.split(" ")) for merge in require_key(about, "merges", list, origin)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = byte_level(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=splitter == "llama-bpe")
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(SPLITTERS[splitter])
    return backend


def sentencepiece_bpe(
    about: Values, tokens: list[str], kinds: list[int], origin: str
) -> hf.Tokenizer:
    """Sentencepiece's BPE, which joins whatever makes a token, the highest score first; a list of merges that does the same."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pieces = {
        token: score
        for token, score, kind in zip(
            tokens, require_key(about, "scores", list, origin), kinds, strict=True
        )
        if kind == NORMAL
    }
    halves = (
        (token[:cut], token[cut:])
        for token in sorted(pieces, key=pieces.get, reverse=True)
        for cut in range(1, len(token))
    )
    merges = [pair for pair in halves if pieces.keys() >= set(pair)]
    unknown = tokens[about.get("unknown_token_id", 0)]
    backend = hf.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    )
    space = about.get("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * space + [normalizers.Replace(" ", "▁")]
    )
    strip = [decoders.Strip(" ", 1, 0)] * space
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
