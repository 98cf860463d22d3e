"""Characters as tokens.

>>> tokenizer = CharTokenizer.train(["hello"])
>>> tokenizer.encode("hole"), tokenizer.decode(tokenizer.encode("hole"))
([3, 5, 4, 2], 'hole')
"""

import sys
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketlm.tokenizer.base import Tokenizer


class CharTokenizer(Tokenizer):
    """One id per character: 0 is <unk>, then bos and eos if they are wanted, then the symbols."""

    kind = name = "char"
    unk_id = 0

    def __init__(
        self, symbols: str, bos: bool = False, eos: bool = True, name: str = "char", note: str = ""
    ):
        self.symbols, self.name, self.note = symbols, name, note
        self.bos_id = 1 if bos else None
        self.eos_id = 1 + bos if eos else None
        self.first_symbol_id = 1 + bos + eos
        self.vocab_size = self.first_symbol_id + len(symbols)
        self.ids = {symbol: i for i, symbol in enumerate(symbols, self.first_symbol_id)}

    @classmethod
    def train(
        cls, texts: Iterable[str], bos: bool = False, eos: bool = True, size: int | None = None
    ) -> "CharTokenizer":
        """Return the tokenizer of the characters of `texts`, in code-point order.

        With `size`, it keeps only the most common characters that fit in a vocabulary of that size.
        """
        counts: Counter[str] = Counter()
        for text in texts:  # one at a time: the corpus may be larger than memory
            counts.update(text if size else set(text))
        by_frequency = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))
        n_symbols = size - 1 - bos - eos if size else len(by_frequency)
        symbols, dropped = by_frequency[:n_symbols], by_frequency[n_symbols:]
        tokenizer = cls("".join(sorted(symbols)), bos, eos, f"char:{size}" if size else "char")
        if dropped:
            share = sum(counts[symbol] for symbol in dropped) / counts.total()
            tokenizer.note = (
                f"the training text has {len(counts):,} different characters; {tokenizer.name} "
                f"keeps the {len(symbols):,} most common, and the other {len(dropped):,}, "
                f"{share:.2%} of the text, become <unk>"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(character, self.unk_id) for character in text]

    @cached_property
    def table(self) -> NDArray[Any]:
        """Id of every code point, shape (code points,)."""
        table = np.full(sys.maxunicode + 1, self.unk_id, self.dtype)
        code_points = [ord(symbol) for symbol in self.symbols]
        table[code_points] = np.arange(self.first_symbol_id, self.vocab_size)
        return table

    def encode_arrays(self, texts: list[str]) -> list[NDArray[Any]]:
        return [self.table[np.frombuffer(text.encode("utf-32-le"), "<u4")] for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._symbol(i) for i in ids if i not in (self.bos_id, self.eos_id))

    def _symbol(self, i: int) -> str:
        """Return the symbol of an id; U+FFFD if it has none."""
        known = self.first_symbol_id <= i < self.vocab_size
        return self.symbols[i - self.first_symbol_id] if known else "\ufffd"

    def state(self) -> dict[str, Any]:
        state = {
            "kind": self.kind,
            "name": self.name,
            "symbols": self.symbols,
            "bos": self.bos_id is not None,
            "eos": self.eos_id is not None,
        }
        return state | ({"note": self.note} if self.note else {})
