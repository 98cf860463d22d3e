"""The interface of every tokenizer: text to token ids and back.

There are tokenizers of bytes, of the bytes that occur, of characters, and byte-pair encodings: one
trained here, GPT-2's, or any `tokenizer.json`. All have three verbs: `encode`, `decode`, `state`.
`from_state` in build.py rebuilds a tokenizer from the plain dict that `state` returns, which a
checkpoint contains. Text is never read as a special token: "<|endoftext|>" in a document is
thirteen characters.

Special tokens delimit the documents of a corpus: `document_prefix`, `document_suffix` and, once at
the end of the corpus, `corpus_suffix`. With bos and eos, or only one of them, a corpus is

    bos and eos    bos text eos | bos text eos
    eos only           eos text | eos text | eos      the end of a document opens the next one
    bos only           bos text | bos text
    neither                text | text
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

END_OF_TEXT, BEGIN_OF_TEXT = "<|endoftext|>", "<|beginoftext|>"


class Tokenizer(ABC):
    """Text to token ids and back."""

    kind: str
    name: str  # as written in a config: char, byte, bpe:4096, gpt2, a path
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    adds_bos = True  # False: documents and prompts have no bos in front, though there is one
    separator_id: int | None = None  # between documents without a bos in front, if it is not eos
    # tokens that end a text besides eos, such as the end of a turn; generation stops at each
    end_ids: tuple[int, ...] = ()
    utf8_errors = "replace"  # how broken UTF-8 is decoded
    note = ""  # a remark for the user on its training, for example about dropped characters

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, without any special token."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, without bos and eos; broken UTF-8 becomes U+FFFD."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return plain values for `from_state`: `kind`, `name`, `note` if any, and others."""

    def token_bytes(self, i: int) -> bytes:
        """Return the UTF-8 of one token within a text; none for bos and eos.

        It may begin or end inside a character.
        """
        return self.decode([i]).encode()

    def has_text(self, i: int) -> bool:
        """Return False for a token that no text contains, such as bos and eos."""
        return i not in (self.bos_id, self.eos_id)

    def spelling(self, i: int, previous: int | None) -> bytes:
        """Return the UTF-8 that a token adds to a text after the token `previous`; None: first."""
        return self.token_bytes(i)

    def encode_arrays(self, texts: list[str]) -> list[NDArray[Any]]:
        """Return the ids of each text as an array of `dtype`; the fast way to encode a corpus."""
        return [np.array(self.encode(text), self.dtype) for text in texts]

    def left_out_characters(self, text: str, ids: NDArray[Any]) -> Counter[str]:
        """Return the characters of the text that no token of `ids`, its encoding, stands for."""
        return Counter()

    def last_token_boundary(self, text: str) -> int:
        """Return the last position at which `text` can be split without changing its ids.

        Both parts, encoded separately, give the ids of the whole. 0: there is no such position.
        """
        return len(text)

    @property
    def dtype(self) -> str:
        """Smallest unsigned integer type that holds every id, in numpy's notation."""
        return "<u2" if self.vocab_size <= 2**16 else "<u4"

    @property
    def document_prefix(self) -> list[int]:
        """Ids before a document in training, and so before every prompt: bos, or else eos."""
        if self.bos_id is not None and self.adds_bos:
            return [self.bos_id]
        return self._separator

    @property
    def document_suffix(self) -> list[int]:
        """Ids after a document: eos, unless the next document's prefix is that eos."""
        with_bos = self.bos_id is not None and self.adds_bos
        return [self.eos_id] if with_bos and self.eos_id is not None else []

    @property
    def corpus_suffix(self) -> list[int]:
        """Ids after the last document: the eos that no document's prefix supplies."""
        return [] if self.bos_id is not None and self.adds_bos else self._separator

    @property
    def _separator(self) -> list[int]:
        """The token between documents without bos: eos, unless the model has learned another."""
        separator_id = self.eos_id if self.separator_id is None else self.separator_id
        return [] if separator_id is None else [separator_id]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the ids of a corpus."""
        others = ("name", "note", "end_ids", "special_tokens")
        state = {key: value for key, value in self.state().items() if key not in others}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
