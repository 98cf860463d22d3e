"""Datasets: token shards to rows.

A row has T + 1 tokens: inputs, and the same tokens shifted by one as targets. Rows are packed (cut
from all documents laid end to end, so that every token is a target exactly once) or padded (one
document per row).

A batch is {input_ids (B, T), targets (B, T)}, and doc_ids (B, T) under document_mask, where tokens
attend within their own document only. A target of IGNORE_INDEX does not count in the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pocketlm.model.loss import IGNORE_INDEX
from pocketlm.shards.format import Tokens, TokenShard

Batch = dict[str, Tensor]
Indices = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class RowFormat:
    """Length and kind of the rows."""

    seq_len: int
    padded: bool = False
    document_mask: bool = False  # packed rows only: a padded row is one document anyway


def as_batch(windows: np.ndarray, lengths: np.ndarray, doc_ids: np.ndarray | None) -> Batch:
    """Return windows (B, T + 1), whose first `lengths` (B,) tokens count, as inputs and targets.

    >>> batch = as_batch(np.array([[7, 8, 0, 0]]), np.array([2]), None)
    >>> {name: rows.tolist() for name, rows in batch.items()}
    {'input_ids': [[7, 0, 0]], 'targets': [[8, -100, -100]]}
    """
    rows = torch.from_numpy(windows.astype(np.int64))
    past_the_end = torch.arange(rows.shape[1] - 1) >= torch.from_numpy(lengths)[:, None] - 1
    batch = {
        "input_ids": rows[:, :-1].masked_fill(past_the_end, 0),
        "targets": rows[:, 1:].masked_fill(past_the_end, IGNORE_INDEX),
    }
    return batch if doc_ids is None else batch | {"doc_ids": torch.from_numpy(doc_ids)}


class PackedLMDataset(Dataset[Batch]):
    """Windows of T + 1 tokens at stride T, so that all tokens but the first are targets once.

    Item i is {input_ids (T,), targets (T,)}, and doc_ids (T,) under document_mask. The last window
    may be short; its missing targets are IGNORE_INDEX.

    >>> tokens = np.arange(6)  # T = 4: the windows 0 1 2 3 | 4 . . .
    >>> {name: row.tolist() for name, row in PackedLMDataset(tokens, 4)[1].items()}
    {'input_ids': [4, 0, 0, 0], 'targets': [5, -100, -100, -100]}
    """

    def __init__(self, source: TokenShard | np.ndarray, seq_len: int, document_mask: bool = False):
        self.source, self.seq_len, self.document_mask = source, seq_len, document_mask
        self.n_tokens = len(self.tokens)

    @property
    def tokens(self) -> Tokens:
        """Token ids (n_tokens,)."""
        return self.source.tokens if isinstance(self.source, TokenShard) else self.source

    @property
    def offsets(self) -> np.ndarray:
        """Index of the first token of each document (documents,); a plain array has none."""
        assert isinstance(self.source, TokenShard), "documents are known in a shard only"
        return self.source.offsets

    def __len__(self) -> int:
        return max(0, -(-(self.n_tokens - 1) // self.seq_len))

    def __getitem__(self, index: int) -> Batch:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first token of each row, and the number of its tokens."""
        starts = rows * self.seq_len
        return starts, np.minimum(self.n_tokens - starts, self.seq_len + 1)

    def __getitems__(self, indices: Indices) -> Batch:
        """Return the rows at `indices` as one batch; an index of -1 is a row without targets."""
        rows = np.asarray(indices)
        starts, lengths = self.bounds(np.maximum(rows, 0))
        positions = starts[:, None] + np.arange(self.seq_len + 1)
        windows = self.tokens[np.minimum(positions, self.n_tokens - 1)]
        doc_ids = None
        if self.document_mask:
            doc_ids = np.searchsorted(self.offsets, positions[:, :-1], side="right")
        return as_batch(windows, np.where(rows < 0, 0, lengths), doc_ids)


class PaddedLMDataset(PackedLMDataset):
    """One document per row, with a loss on its tokens only, truncated to T + 1 tokens.

    A document of a single token has no target and so no row. `ends_shared`: the first token of a
    document is also the end of the document before it, as it is if the tokenizer has an eos and no
    bos.
    """

    def __init__(self, source: TokenShard, seq_len: int, ends_shared: bool):
        super().__init__(source, seq_len)
        self.lengths = source.row_lengths(ends_shared)
        self.documents = np.flatnonzero(self.lengths > 1)  # of each row

    def __len__(self) -> int:
        return len(self.documents)

    def bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        documents = self.documents[rows]
        return self.offsets[documents], np.minimum(self.lengths[documents], self.seq_len + 1)


class JoinedDataset(Dataset[Batch]):
    """The rows of several datasets, one dataset after another."""

    def __init__(self, datasets: list[PackedLMDataset]):
        self.datasets = datasets
        self.first_rows = np.cumsum([0, *map(len, datasets)])

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitems__(self, indices: Indices) -> Batch:
        """Return the rows at `indices` as one batch; an index of -1 is a row without targets."""
        rows = np.asarray(indices)
        owners = np.searchsorted(self.first_rows, np.maximum(rows, 0), side="right") - 1
        batch: Batch = {}
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            # An index of -1 belongs to the first dataset, whose first row is 0, and so stays -1.
            local = rows[mine] - self.first_rows[number]
            for name, values in self.datasets[number].__getitems__(local).items():
                if name not in batch:
                    batch[name] = values.new_empty(len(rows), values.shape[1])
                batch[name][mine] = values
        return batch


RowDataset = PackedLMDataset | JoinedDataset


def build_row_dataset(
    shards: Sequence[TokenShard], row_format: RowFormat, ends_shared: bool
) -> RowDataset:
    """Return the rows of shards in one dataset. `ends_shared`: see PaddedLMDataset."""
    seq_len = row_format.seq_len
    datasets: list[PackedLMDataset] = []
    for shard in shards:
        if row_format.padded:
            datasets.append(PaddedLMDataset(shard, seq_len, ends_shared))
        else:
            datasets.append(PackedLMDataset(shard, seq_len, row_format.document_mask))
    return datasets[0] if len(datasets) == 1 else JoinedDataset(datasets)
