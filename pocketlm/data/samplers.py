"""Samplers: the order of rows, a pure function of the seed, and a loader that resumes in it."""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from pocketlm.data.datasets import Batch, RowDataset
from pocketlm.errors import UserError

ENDLESS = 2**40  # batches of a training sampler: the number of steps ends a run, never the data

MIXTURE_BLOCK = 1000  # rows in which each source of a mixture has its exact proportion


@dataclass(frozen=True)
class DataShard:
    """One of `count` processes that share the data: a rank, or a worker process of a stream."""

    index: int = 0
    count: int = 1


ONLY_PROCESS = DataShard()


class ShuffledBatchSampler:
    """Endless batches of row indices: each epoch is a permutation that depends on seed and epoch.

    Rank r of w takes rows r*B to (r+1)*B of every w*B rows, so that the order of tokens does not
    depend on the number of devices.
    """

    def __init__(self, size: int, batch_size: int, seed: int, shard: DataShard = ONLY_PROCESS):
        self.size, self.batch_size, self.seed, self.shard = size, batch_size, seed, shard
        self.first_batch = 0  # batches that this rank has had already
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def indices(self, first: int, count: int) -> list[int]:
        """Return the row indices at positions `first` to `first + count`, over ranks and epochs."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, start = divmod(first + len(indices), self.size)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._permutation = torch.randperm(self.size, generator=generator)
                self._epoch = epoch
            indices += self._permutation[start : start + count - len(indices)].tolist()
        return indices

    def index(self, position: int) -> int:
        """Return the row index at one position."""
        return self.indices(position, 1)[0]

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.first_batch, ENDLESS):
            first = (batch * self.shard.count + self.shard.index) * self.batch_size
            yield self.indices(first, self.batch_size)


class MixtureBatchSampler(ShuffledBatchSampler):
    """A ShuffledBatchSampler over datasets of `sizes` laid end to end, mixed by weight.

    Every MIXTURE_BLOCK rows hold each dataset in its proportion, and each has epochs of its own.
    """

    def __init__(
        self,
        sizes: list[int],
        weights: Iterable[float],
        batch_size: int,
        seed: int,
        shard: DataShard = ONLY_PROCESS,
    ):
        super().__init__(sum(sizes), batch_size, seed, shard)
        self.first_rows = np.cumsum([0, *sizes])
        self.samplers = [
            ShuffledBatchSampler(size, 1, seed + 7919 * number) for number, size in enumerate(sizes)
        ]
        self.rows_per_block = proportions(weights)
        self._block = -1
        self._datasets = self._counts = np.empty(0, int)

    def _draw(self, block: int) -> None:
        """Draw the dataset of each row of a block, and count its rows before that one."""
        numbers = np.repeat(np.arange(len(self.rows_per_block)), self.rows_per_block)
        self._datasets = np.random.default_rng([self.seed, block]).permutation(numbers)
        self._counts = np.empty_like(self._datasets)
        for number, rows in enumerate(self.rows_per_block):
            self._counts[self._datasets == number] = np.arange(rows)
        self._block = block

    def indices(self, first: int, count: int) -> list[int]:
        return [self.index(position) for position in range(first, first + count)]

    def index(self, position: int) -> int:
        block, row = divmod(position, MIXTURE_BLOCK)
        if block != self._block:
            self._draw(block)
        number = int(self._datasets[row])
        own_position = block * int(self.rows_per_block[number]) + int(self._counts[row])
        return int(self.first_rows[number]) + self.samplers[number].index(own_position)

    def rows_per_dataset(self, rows: int) -> list[int]:
        """Return how many of the first `rows` rows are from each dataset."""
        blocks, rest = divmod(rows, MIXTURE_BLOCK)
        self._draw(blocks)
        return [
            blocks * int(per_block) + int((self._datasets[:rest] == number).sum())
            for number, per_block in enumerate(self.rows_per_block)
        ]


def proportions(weights: Iterable[float]) -> np.ndarray:
    """Return the rows of each of MIXTURE_BLOCK rows, by largest remainder.

    Raises UserError for a weight that is too small for one row.

    >>> proportions([2, 1]).tolist()
    [667, 333]
    """
    array = np.array(list(weights), float)
    exact = array / array.sum() * MIXTURE_BLOCK
    rows: np.ndarray = np.floor(exact).astype(int)
    rows[np.argsort(rows - exact, kind="stable")[: MIXTURE_BLOCK - rows.sum()]] += 1
    if not rows.all():
        raise UserError(
            f"data.mixture: a weight of {array[rows == 0][0]:g} is below a row in {MIXTURE_BLOCK}; "
            "raise it or leave it out"
        )
    return rows


class ValidationBatchSampler:
    """Every row index once, in order, in batches of one size; the last is filled up with -1."""

    def __init__(self, size: int, batch_size: int, shard: DataShard = ONLY_PROCESS):
        self.size, self.batch_size, self.shard = size, batch_size, shard

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.shard.count))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = (batch * self.shard.count + self.shard.index) * self.batch_size
            yield [i if i < self.size else -1 for i in range(first, first + self.batch_size)]


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader whose state is the number of rows that all ranks have had of it."""

    def __init__(
        self,
        dataset: RowDataset,
        batch_sampler: ShuffledBatchSampler | ValidationBatchSampler,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.batches_yielded = 0
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            **LOADER_OPTIONS,
        )

    # torch's annotation names its private iterator class.
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if not isinstance(self.batch_sampler, ShuffledBatchSampler):
            yield from super().__iter__()
            return
        self.batch_sampler.first_batch = self.batches_yielded
        for batch in super().__iter__():
            self.batches_yielded += 1
            yield batch

    @property
    def rows_per_batch(self) -> int:
        """Rows that all ranks have together in a batch each."""
        assert isinstance(self.batch_sampler, ShuffledBatchSampler | ValidationBatchSampler)
        return self.batch_sampler.batch_size * self.batch_sampler.shard.count

    def state_dict(self) -> dict[str, int]:
        """Return the state for a checkpoint, which any number of ranks can resume."""
        return {"rows": self.batches_yielded * self.rows_per_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume after the rows that were yielded before `state` was taken."""
        self.batches_yielded = state["rows"] // self.rows_per_batch


def set_worker_signals(_: int) -> None:
    """Let a worker process ignore Ctrl-C, which the training process handles, and obey SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def no_collate(batch: Any) -> Any:
    """Return the batch: the datasets make whole batches."""
    return batch


LOADER_OPTIONS: dict[str, Any] = {
    "collate_fn": no_collate,
    "worker_init_fn": set_worker_signals,
    "generator": torch.Generator(),  # of its own: the default draws from the global generator
}
