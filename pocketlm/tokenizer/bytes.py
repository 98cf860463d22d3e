"""Bytes as tokens: all 256 of them, or those that occur in a corpus."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer

UNSEEN = 256  # in the table of SeenBytesTokenizer: this byte has no id


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, followed by bos and eos if they are wanted."""

    kind = name = "byte"

    def __init__(self, bos: bool = False, eos: bool = True):
        self.bos_id = 256 if bos else None
        self.eos_id = 256 + bos if eos else None
        self.vocab_size = 256 + bos + eos

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_arrays(self, texts: list[str]) -> list[NDArray[Any]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self, i: int) -> bytes:
        return bytes([i]) if i < 256 else b""

    def state(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "bos": self.bos_id is not None,
            "eos": self.eos_id is not None,
        }


class SeenBytesTokenizer(Tokenizer):
    """The bytes that occur in a corpus, in order, followed by bos and eos: microgpt's vocabulary.

    There is no id for any other byte. It is therefore trained on all documents, including the
    held-out ones.
    """

    kind = name = "seen-bytes"

    def __init__(self, seen: bytes, bos: bool = False, eos: bool = True):
        self.seen = np.frombuffer(seen, np.uint8)
        self.bos_id = len(seen) if bos else None
        self.eos_id = len(seen) + bos if eos else None
        self.vocab_size = len(seen) + bos + eos
        self.ids = np.full(256, UNSEEN, np.uint16)  # id of each byte
        self.ids[self.seen] = np.arange(len(seen))

    @classmethod
    def train(
        cls, texts: Iterable[str], bos: bool = False, eos: bool = True
    ) -> "SeenBytesTokenizer":
        """Return the tokenizer of the bytes of `texts`."""
        counts = np.zeros(256, np.int64)
        for text in texts:
            counts += np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
        return cls(bytes(np.flatnonzero(counts).tolist()), bos, eos)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.encode_arrays([text])[0].tolist()
        return ids

    def encode_arrays(self, texts: list[str]) -> list[NDArray[Any]]:
        rows = [self.ids[np.frombuffer(text.encode(), np.uint8)] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            unseen = np.flatnonzero(row == UNSEEN)
            if len(unseen):
                before = text.encode()[: unseen[0]].decode(errors="ignore")
                raise UserError(
                    f"{text[len(before)]!r} has a byte that does not occur in the text on which "
                    f"the tokenizer {self.name!r} was trained; "
                    "remove it, or train with data.tokenizer=byte"
                )
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        return self.seen[[i for i in ids if i < len(self.seen)]].tobytes().decode(errors="replace")

    def token_bytes(self, i: int) -> bytes:
        return self.seen[i : i + 1].tobytes()

    def state(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "seen": self.seen.tolist(),
            "bos": self.bos_id is not None,
            "eos": self.eos_id is not None,
        }
