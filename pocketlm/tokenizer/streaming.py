"""Detokenisation: tokens to bytes, and bytes to text as the tokens are generated.

What a token adds to a text depends on what stands before it: SentencePiece drops the first space of
a text, WordPiece puts a space before each word but the first, and one character may be the bytes of
four tokens. So a stream knows its prompt, and a text is the bytes of its tokens, read as UTF-8:

    text = decode(prompt + answer)      and      stream_text(tokenizer, answer, prompt)

is `text` without what the prompt had already completed.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence

import tokenizers as hf

from pocketlm.tokenizer.base import Tokenizer

EACH_BYTE = "pocketlm.each_byte"  # an error handler of UTF-8: U+FFFD for each broken byte
WITHIN_TEXT = -1  # instead of the token before: there is one, whichever it is
ANCHOR = "a"  # a token that decoders leave as it is

codecs.register_error(
    EACH_BYTE,
    lambda error: ("\ufffd" * (error.end - error.start), error.end),  # type: ignore
)


# ---- bytes to text ----


def stream_text(
    tokenizer: Tokenizer, ids: Iterable[int], prompt: Sequence[int] = ()
) -> Iterator[str]:
    """Yield what `ids` add to the text of the prompt, in pieces; no piece is empty.

    A character that the prompt began belongs to the pieces.
    """
    stream = TextStream(tokenizer, prompt)
    for i in ids:
        if text := stream.push(i):
            yield text
    if text := stream.flush():
        yield text


def complete_text(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Return the text of the ids without a character that further ids may complete."""
    stream = TextStream(tokenizer)
    return "".join([stream.push(i) for i in ids])


class TextStream:
    """Incremental decoder: push the ids after a prompt, get text.

    Only the bytes of an incomplete last character are held back, three at most.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self.previous: int | None = None  # the last token with a text
        self.utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.utf8_errors)
        for i in prompt:
            self.push(i)

    def push(self, i: int) -> str:
        """Return the text that the id completes; often none."""
        if not self.tokenizer.has_text(i):
            return ""
        spelling = self.tokenizer.spelling(i, self.previous)
        self.previous = i
        return self.utf8.decode(spelling)

    def flush(self) -> str:
        """Return U+FFFD for an incomplete last character, because no id follows."""
        return self.utf8.decode(b"", final=True)


# ---- tokens of the `tokenizers` library to bytes ----


def byte_letters() -> dict[int, str]:
    """Return the letter with which GPT-2's vocabulary spells each byte.

    It is the byte's own if it is visible, else one from code point 256 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = {byte: chr(byte) for byte in visible}
    hidden = [byte for byte in range(256) if byte not in visible]
    return letters | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def letter_bytes() -> dict[str, int]:
    """Return the byte of each letter: the inverse of `byte_letters`."""
    return {letter: byte for byte, letter in byte_letters().items()}


class Speller:
    """The bytes that a token adds to a text, according to the decoder of a tokenizer.json.

    The library decodes whole texts only. What a token adds is the difference between two of them,
    with the token and without it; a token that is part of a character is read from its spelling.
    """

    def __init__(self, backend: hf.Tokenizer):
        self.backend = backend
        decoder = json.loads(backend.to_str())["decoder"] or {"type": None}
        kinds = {step["type"] for step in decoder.get("decoders", [decoder])}
        self.letters = letter_bytes() if "ByteLevel" in kinds else {}
        self.has_bytes = "ByteFallback" in kinds
        # these two look at the token before; to the others it matters only that there is one
        self.looks_back = not kinds.isdisjoint(("BPEDecoder", "CTC"))
        self.added_ids = set(backend.get_added_tokens_decoder())
        self.spellings: dict[tuple[int, int | None], bytes] = {}

    def spelling(self, i: int, previous: int | None) -> bytes:
        """Return what token `i` adds after the token `previous`; None: it is the first."""
        key = i, previous if self.looks_back or previous is None else WITHIN_TEXT
        found = self.spellings.get(key)
        if found is None:
            found = self.spellings[key] = self._spell(*key)
        return found

    def _spell(self, i: int, previous: int | None) -> bytes:
        token = self.backend.id_to_token(i)
        assert token is not None
        raw = self._raw_bytes(i, token)
        if raw is not None and (i in self.added_ids or not is_text(raw)):
            return raw
        before = [] if previous is None else [ANCHOR]
        if previous is not None and previous != WITHIN_TEXT:
            before.append(self.backend.id_to_token(previous) or "")
        return self._decode([*before, token])[len(self._decode(before)) :].encode()

    def _raw_bytes(self, i: int, token: str) -> bytes | None:
        """Return the bytes that the token spells, if it spells bytes."""
        if self.has_bytes and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if not self.letters:
            return None
        if i in self.added_ids or not self.letters.keys() >= set(token):
            return token.encode()  # in plain characters
        return bytes(self.letters[letter] for letter in token)

    def _decode(self, tokens: list[str]) -> str:
        decoder = self.backend.decoder
        text: str = decoder.decode(tokens) if decoder else " ".join(tokens)
        return text


def is_text(raw: bytes) -> bool:
    """Return whether the bytes are whole characters of UTF-8."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
