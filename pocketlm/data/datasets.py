"""Tokens to rows: every token is a target exactly once, or a document has a row of its own.

Batches are {input_ids (B, T), targets (B, T)}, and doc_ids (B, T) where a row holds tokens of several documents that may
not see each other. Targets are the inputs shifted by one; -100 is no target.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pocketlm.data.shards import TokenShard
from pocketlm.model.loss import IGNORE_INDEX


def as_batch(
    windows: np.ndarray, lengths: np.ndarray, doc_ids: np.ndarray | None
) -> dict[str, Tensor]:
    """Windows (B, T + 1), of which the first `lengths` (B,) tokens count, as inputs and targets; a missing target is -100.

    >>> {name: rows.tolist() for name, rows in as_batch(np.array([[7, 8, 0, 0]]), np.array([2]), None).items()}
    {'input_ids': [[7, 0, 0]], 'targets': [[8, -100, -100]]}
    """
    rows = torch.from_numpy(windows.astype(np.int64))
    past_the_end = torch.arange(rows.shape[1] - 1) >= torch.from_numpy(lengths)[:, None] - 1
    batch = {
        "input_ids": rows[:, :-1].masked_fill(past_the_end, 0),
        "targets": rows[:, 1:].masked_fill(past_the_end, IGNORE_INDEX),
    }
    return batch if doc_ids is None else batch | {"doc_ids": torch.from_numpy(doc_ids)}


class PackedLMDataset(Dataset):
    """Windows of T + 1 tokens at stride T over a shard, so that every token but the first is a target exactly once.

    Item i is {input_ids (T,), targets (T,)}, and doc_ids (T,) under document_mask. The last window is short: its missing
    targets are -100.

    >>> tokens = np.arange(6)  # T = 4: the windows 0 1 2 3 | 4 . . .
    >>> {k: v.tolist() for k, v in PackedLMDataset(tokens, 4)[1].items()}
    {'input_ids': [4, 0, 0, 0], 'targets': [5, -100, -100, -100]}
    """

    def __init__(self, source: TokenShard | np.ndarray, seq_len: int, document_mask: bool = False):
        self.source, self.seq_len, self.document_mask = source, seq_len, document_mask
        self.size = len(self.tokens)

    @property
    def tokens(self) -> np.ndarray:
        return self.source.tokens if isinstance(self.source, TokenShard) else self.source

    def __len__(self) -> int:
        return max(0, -(-(self.size - 1) // self.seq_len))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def bounds(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the windows at `indices` begin, and how many tokens each has."""
        starts = indices * self.seq_len
        return starts, np.minimum(self.size - starts, self.seq_len + 1)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The rows at `indices` as one batch, {name: (B, T)}; an index of -1 is a row without targets."""
        asked = np.asarray(indices)
        starts, lengths = self.bounds(np.maximum(asked, 0))
        positions = starts[:, None] + np.arange(self.seq_len + 1)
        windows = self.tokens[np.minimum(positions, self.size - 1)]
        doc_ids = (
            np.searchsorted(self.source.offsets, positions[:, :-1], side="right")
            if self.document_mask
            else None
        )
        return as_batch(windows, np.where(asked < 0, 0, lengths), doc_ids)


class PaddedLMDataset(PackedLMDataset):
    """A document a row, loss on its tokens alone; one longer than T + 1 tokens is cut off there.

    `ends_shared`: the first token of a document is also the end of the one before it, as with eos alone.
    """

    def __init__(self, source: TokenShard, seq_len: int, ends_shared: bool):
        super().__init__(source, seq_len)
        self.ends_shared = ends_shared

    def __len__(self) -> int:
        return len(self.source.offsets)

    def bounds(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offsets = self.source.offsets
        after = np.minimum(indices + 1, len(offsets) - 1)
        stops = np.where(indices + 1 < len(offsets), offsets[after] + self.ends_shared, self.size)
        return offsets[indices], np.minimum(stops - offsets[indices], self.seq_len + 1)


class JoinedDataset(Dataset):
    """The rows of several datasets one after another."""

    def __init__(self, parts: list[PackedLMDataset]):
        self.parts = parts
        self.firsts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        asked = np.asarray(indices)
        of = np.searchsorted(self.firsts, np.maximum(asked, 0), side="right") - 1
        batch: dict[str, Tensor] = {}
        for number in np.unique(of):
            rows = np.flatnonzero(of == number)
            local = (
                asked[rows] - self.firsts[number]
            )  # -1 counts as the very first row, and stays -1
            for name, values in self.parts[number].__getitems__(local).items():
                batch.setdefault(name, values.new_empty(len(asked), values.shape[1]))[rows] = values
        return batch
