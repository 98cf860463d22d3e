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
        """Return the UTF-8 of one token, which may end inside a character; none for bos and eos."""
        return self.decode([i]).encode()

    def encode_arrays(self, texts: list[str]) -> list[NDArray[Any]]:
        """Return the ids of each text as an array of `dtype`; the fast way to encode a corpus."""
        return [np.array(self.encode(text), self.dtype) for text in texts]

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
        if self.bos_id is not None:
            return [self.bos_id]
        return [] if self.eos_id is None else [self.eos_id]

    @property
    def document_suffix(self) -> list[int]:
        """Ids after a document: eos, unless the next document's prefix is that eos."""
        return [] if self.bos_id is None or self.eos_id is None else [self.eos_id]

    @property
    def corpus_suffix(self) -> list[int]:
        """Ids after the last document: the eos that no document's prefix supplies."""
        return [self.eos_id] if self.bos_id is None and self.eos_id is not None else []

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the ids; the name and the note do not."""
        state = {key: value for key, value in self.state().items() if key not in ("name", "note")}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
