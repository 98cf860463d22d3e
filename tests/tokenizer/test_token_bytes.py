"""The bytes of tokens, joined, are the text that was encoded."""

from collections.abc import Callable

import pytest
import tokenizers as hf
from tokenizers import decoders, models, normalizers

from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer, SeenBytesTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.chat import chat_tokenizer


def llama_tokenizer() -> JsonTokenizer:
    """Return a SentencePiece tokenizer like Llama 2's: spaces are a letter, with byte fallback."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", *byte_tokens, "\u2581", *"abcnve"]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = hf.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return JsonTokenizer(backend.to_str(), "llama", 1, None)


BUILDERS = {
    "byte": ByteTokenizer,
    "seen-bytes": lambda: SeenBytesTokenizer(bytes(range(256))),
    "char": lambda: CharTokenizer.train(["naïve 😀 abc"]),
    "bpe": chat_tokenizer,
    "sentencepiece": llama_tokenizer,
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_the_bytes_of_the_tokens_are_the_text(build: Callable[[], Tokenizer]) -> None:
    tokenizer = build()
    for text in ("naïve 😀 abc", "😀", "abc abc"):
        ids = tokenizer.encode(text)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert joined.lstrip(" ") == text == tokenizer.decode(ids)
    for special in {tokenizer.bos_id, tokenizer.eos_id} - {None}:
        assert tokenizer.token_bytes(special) == b""
