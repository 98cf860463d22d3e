"""Small tokenizers, each made of the parts that a family's tokenizer.json has."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.support.pretrained import CORPUS

SIZE = 360
# of huggingface.co/Qwen/Qwen2-0.5B and huggingface.co/meta-llama/Meta-Llama-3-8B, which split the
# digits of a number one by one and by three
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def trained(backend: hf.Tokenizer, special: list[str], alphabet: list[str]) -> hf.Tokenizer:
    """Train the tokenizer; the special tokens come first, as in SentencePiece's."""
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level(splitter: list[Any], special: list[str]) -> hf.Tokenizer:
    """Return a byte-level BPE whose special tokens come last."""
    backend = hf.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(splitter)
    backend.decoder = decoders.ByteLevel()
    trained(backend, [], pre_tokenizers.ByteLevel.alphabet())
    backend.add_special_tokens(special)
    return backend


def by_pattern(digits: str) -> list[Any]:
    pattern = hf.Regex(PATTERN.replace("{DIGITS}", digits))
    return [pre_tokenizers.Split(pattern, "isolated"), BYTE_LEVEL]


def qwen() -> hf.Tokenizer:
    backend = byte_level(by_pattern(""), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def llama3() -> hf.Tokenizer:
    backend = byte_level(by_pattern("{1,3}"), ["<|begin_of_text|>", "<|end_of_text|>"])
    spec = json.loads(backend.to_str())
    spec["model"]["ignore_merges"] = True
    backend = hf.Tokenizer.from_str(json.dumps(spec))
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
            ),
        ]
    )
    return backend


def smollm() -> hf.Tokenizer:
    splitter = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    backend = byte_level(splitter, ["<|im_start|>", "<|im_end|>"])
    backend.post_processor = processors.ByteLevel()
    return backend


def sentencepiece() -> hf.Tokenizer:
    """Return a tokenizer as TinyLlama's and the first Mistral's."""
    backend = hf.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trained(backend, ["<unk>", "<s>", "</s>", *of_bytes], [])
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are tokens like others
    backend = hf.Tokenizer.from_str(json.dumps(spec))
    to_text = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
IM = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
FAST = "PreTrainedTokenizerFast"
# the model_type, the tokenizer, and tokenizer_config.json
TOKENIZERS: dict[str, tuple[str, Callable[[], hf.Tokenizer], dict[str, Any]]] = {
    "qwen2": ("qwen2", qwen, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}),
    "qwen3": ("qwen3", qwen, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}),
    "llama 3": ("llama", llama3, {"tokenizer_class": FAST, **LLAMA3}),
    "llama 3, newer": ("llama", llama3, {"tokenizer_class": "TokenizersBackend", **LLAMA3}),
    "smollm": ("llama", smollm, {"tokenizer_class": "GPT2Tokenizer", **IM}),
    "tinyllama": ("llama", sentencepiece, {"tokenizer_class": "LlamaTokenizer", **SENTENCEPIECE}),
    "mistral": ("mistral", sentencepiece, {"tokenizer_class": "LlamaTokenizer", **SENTENCEPIECE}),
}


@cache
def tokenizer_files(name: str) -> dict[str, str]:
    """Return the files of a family's tokenizer by their names."""
    _, make, config = TOKENIZERS[name]
    return {"tokenizer.json": make().to_str(), "tokenizer_config.json": json.dumps(config)}


def write_tokenizer(name: str, folder: Path) -> Path:
    """Write the files of a family's tokenizer to a folder."""
    for file, text in tokenizer_files(name).items():
        (folder / file).write_text(text)
    return folder
