"""Characters as tokens.

>>> tokenizer = CharTokenizer.train(["hello"])
>>> tokenizer.encode("hole"), tokenizer.decode(tokenizer.encode("hole"))
([3, 5, 4, 2], 'hole')
"""

import sys
from collections import Counter
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from pocketlm.tokenizer.base import Tokenizer


class CharTokenizer(Tokenizer):
    """One id a character: 0 is an unknown one, then begin and end of document where wanted, then the symbols."""

    kind = name = "char"
    unk_id = 0

    def __init__(
        self, symbols: str, bos: bool = False, eos: bool = True, name: str = "char", note: str = ""
    ):
        self.symbols, self.name, self.note = symbols, name, note
        self.bos_id = 1 if bos else None
        self.eos_id = 1 + bos if eos else None
        self.first = 1 + bos + eos  # the first symbol's id
        self.vocab_size = self.first + len(symbols)
        self.ids = {symbol: i for i, symbol in enumerate(symbols, self.first)}

    @classmethod
    def train(
        cls, texts: Iterable[str], bos: bool = False, eos: bool = True, size: int | None = None
    ) -> "CharTokenizer":
        """Every character of `texts`, in code-point order; under a `size` the commonest, so that there are so many entries at most."""
        counts: Counter[str] = Counter()
        for text in texts:  # one at a time: the corpus may be larger than memory
            counts.update(text if size else set(text))
        kept = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))[
            : size and size - 1 - bos - eos
        ]
        tokenizer = cls("".join(sorted(kept)), bos, eos, f"char:{size}" if size else "char")
        if lost := counts.keys() - set(kept):
            share = sum(counts[symbol] for symbol in lost) / counts.total()
            tokenizer.note = (
                f"the training text has {len(counts):,} different characters; {tokenizer.name} keeps the {len(kept):,} commonest, "
                f"and the other {len(lost):,}, {share:.2%} of the text, become <unk>"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(character, self.unk_id) for character in text]

    @cached_property
    def table(self) -> np.ndarray:
        """(code points,) the id of each."""
        table = np.full(sys.maxunicode + 1, self.unk_id, self.dtype)
        table[[ord(symbol) for symbol in self.symbols]] = np.arange(self.first, self.vocab_size)
        return table

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [self.table[np.frombuffer(text.encode("utf-32-le"), "<u4")] for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        around = {self.bos_id, self.eos_id}
        return "".join(
            self.symbols[i - self.first] if self.first <= i < self.vocab_size else "\ufffd"
            for i in ids
            if i not in around
        )

    def state(self) -> dict:
        around = {"bos": self.bos_id is not None, "eos": self.eos_id is not None}
        note = {"note": self.note} if self.note else {}
        return {"kind": self.kind, "name": self.name, "symbols": self.symbols, **around, **note}
