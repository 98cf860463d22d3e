"""Bytes as tokens: all 256, or those that occur."""

from collections.abc import Iterable

import numpy as np

from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then a begin and an end of document where they are wanted."""

    kind = name = "byte"

    def __init__(self, bos: bool = False, eos: bool = True):
        self.bos_id = 256 if bos else None
        self.eos_id = 256 + bos if eos else None
        self.vocab_size = 256 + bos + eos

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def spell(self, i: int) -> bytes:
        return bytes([i]) if i < 256 else b""

    def state(self) -> dict:
        return {
            "kind": self.kind,
            "name": self.name,
            "bos": self.bos_id is not None,
            "eos": self.eos_id is not None,
        }


class SeenBytesTokenizer(Tokenizer):
    """The bytes that occur in a corpus, in order, then a begin and an end of document: microgpt's vocabulary.

    It has no id for any other byte, and so is made from all of the documents, those for validation too.
    """

    kind = name = "seen-bytes"

    def __init__(self, seen: bytes, bos: bool = False, eos: bool = True):
        self.seen = np.frombuffer(seen, np.uint8)
        self.bos_id = len(seen) if bos else None
        self.eos_id = len(seen) + bos if eos else None
        self.vocab_size = len(seen) + bos + eos
        self.ids = np.full(256, 256, np.uint16)
        self.ids[self.seen] = np.arange(len(seen))

    @classmethod
    def train(
        cls, texts: Iterable[str], bos: bool = False, eos: bool = True
    ) -> "SeenBytesTokenizer":
        counts = np.zeros(256, np.int64)
        for text in texts:
            counts += np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
        return cls(bytes(np.flatnonzero(counts).tolist()), bos, eos)

    def encode(self, text: str) -> list[int]:
        return self.encode_arrays([text])[0].tolist()

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        rows = [self.ids[np.frombuffer(text.encode(), np.uint8)] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(unseen := np.flatnonzero(row == 256)):
                before = text.encode()[: unseen[0]].decode(errors="ignore")
                raise UserError(
                    f"{text[len(before)]!r} has a byte that does not occur in the text of which the tokenizer {self.name!r} was made; "
                    "leave it out, or train with data.tokenizer=byte"
                )
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        return self.seen[[i for i in ids if i < len(self.seen)]].tobytes().decode(errors="replace")

    def spell(self, i: int) -> bytes:
        return self.seen[i : i + 1].tobytes()

    def state(self) -> dict:
        around = {"bos": self.bos_id is not None, "eos": self.eos_id is not None}
        return {"kind": self.kind, "name": self.name, "seen": self.seen.tolist(), **around}
