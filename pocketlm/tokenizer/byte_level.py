"""GPT-2's spelling of bytes: each of the 256 bytes is one visible letter of the vocabulary."""

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers


def byte_level_backend(model: models.BPE) -> hf.Tokenizer:
    """Return a backend around `model` that splits text and spells bytes as GPT-2 does."""
    backend = hf.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_letters() -> dict[int, str]:
    """Return the letter of each byte: itself if it is visible, else one from code point 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = {byte: chr(byte) for byte in visible}
    hidden = [byte for byte in range(256) if byte not in visible]
    return letters | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def letter_bytes() -> dict[str, int]:
    """Return the byte of each letter: the inverse of `byte_letters`."""
    return {letter: byte for byte, letter in byte_letters().items()}
