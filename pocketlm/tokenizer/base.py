"""Text to token ids and back: bytes, those that occur, characters, a BPE trained here, GPT-2's, or any `tokenizer.json`.

Every tokenizer has three verbs, `encode`, `decode` and `state`; `from_state` builds it again from the plain dict that
`state` gave, which is what a checkpoint carries. Text is only ever text: "<|endoftext|>" in a document is thirteen
characters. The ids around documents are `prefix`, `closing` and `final`:

    with bos and eos    bos text eos | bos text eos
    with eos only           eos text | eos text | eos      the end of a document opens the next
    with bos only           bos text | bos text
    with neither                text | text
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property

import numpy as np

END_OF_TEXT, BEGIN_OF_TEXT = "<|endoftext|>", "<|beginoftext|>"


class Tokenizer(ABC):
    """What every kind has."""

    kind: str
    name: str  # as a config says it: char, byte, bpe:4096, gpt2, a path
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    note = ""  # what a person should know of how it was trained

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str: ...

    @abstractmethod
    def state(self) -> dict:
        """All that `from_state` needs, in plain types; holds `kind` and `name`, and `note` where there is one."""

    def spell(self, i: int) -> bytes:
        """What the id adds to a text: UTF-8, which may end within a character; empty for those around a document."""
        return self.decode([i]).encode()

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, as `dtype`; the fast way for a corpus."""
        return [np.array(self.encode(text), self.dtype) for text in texts]

    def cut(self, text: str) -> int:
        """The last place where `text` can be cut so that its two sides have the ids that they have together; 0: nowhere."""
        return len(text)

    @property
    def dtype(self) -> str:
        """The smallest unsigned numbers that hold every id, as numpy spells them."""
        return "<u2" if self.vocab_size <= 2**16 else "<u4"

    @property
    def prefix(self) -> list[int]:
        """What stands before a document's text in training, and so before every prompt: bos, or the last one's eos."""
        return next(([i] for i in (self.bos_id, self.eos_id) if i is not None), [])

    @property
    def closing(self) -> list[int]:
        """What stands behind a document's text, unless the next one's prefix does."""
        return [] if self.bos_id is None or self.eos_id is None else [self.eos_id]

    @property
    def final(self) -> list[int]:
        """What stands behind the last document: the eos that no prefix follows up."""
        return [self.eos_id] if self.bos_id is None and self.eos_id is not None else []

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids; the name and the note do not."""
        state = {key: value for key, value in self.state().items() if key not in ("name", "note")}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
