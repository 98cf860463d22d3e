"""The order of rows, which is a function of the seed, and the loader that can go on in the middle of it."""

import signal
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pocketlm.errors import UserError

ENDLESS = 2**40  # batches in a training order: the step count ends a run, never the data


MIXTURE_BLOCK = 1000  # rows in which a mixture has its proportions


class ShuffledBatchSampler:
    """Batches of dataset indices without end: each epoch a new permutation, a pure function of (seed, epoch, index).

    Rank r of w takes rows r*B to (r+1)*B of every w*B, so that more devices see the same tokens in the same order.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.size, self.batch_size, self.seed, self.rank, self.world_size = (
            size,
            batch_size,
            seed,
            rank,
            world_size,
        )
        self.start = 0  # batches that this rank has had
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def indices(self, first: int, count: int) -> list[int]:
        """The dataset indices at so many positions, counted over all ranks and epochs."""
        found: list[int] = []
        while len(found) < count:
            epoch, place = divmod(first + len(found), self.size)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._epoch, self._permutation = (
                    epoch,
                    torch.randperm(self.size, generator=generator),
                )
            found += self._permutation[place : place + count - len(found)].tolist()
        return found

    def index(self, position: int) -> int:
        return self.indices(position, 1)[0]

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, ENDLESS):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield self.indices(first, self.batch_size)


class MixtureBatchSampler(ShuffledBatchSampler):
    """The same over datasets of `sizes` laid end to end: every 1,000 rows hold each in its proportion, each in epochs of its own."""

    def __init__(
        self,
        sizes: list[int],
        weights: Iterable[float],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(sum(sizes), batch_size, seed, rank, world_size)
        self.firsts = np.cumsum([0, *sizes])
        self.parts = [
            ShuffledBatchSampler(size, 1, seed + 7919 * number) for number, size in enumerate(sizes)
        ]
        self.shares = proportions(weights)
        self._block, self._drawn, self._nth = -1, np.empty(0, int), np.empty(0, int)

    def draw(self, block: int) -> None:
        """Which dataset each row of a block is from, and how many rows of that are before it in the block."""
        drawn = np.random.default_rng([self.seed, block]).permutation(
            np.repeat(np.arange(len(self.shares)), self.shares)
        )
        nth = np.empty_like(drawn)
        for number, share in enumerate(self.shares):
            nth[drawn == number] = np.arange(share)
        self._block, self._drawn, self._nth = block, drawn, nth

    def indices(self, first: int, count: int) -> list[int]:
        return [self.index(position) for position in range(first, first + count)]

    def index(self, position: int) -> int:
        block, place = divmod(position, MIXTURE_BLOCK)
        if block != self._block:
            self.draw(block)
        number = self._drawn[place]
        return int(self.firsts[number]) + self.parts[number].index(
            block * int(self.shares[number]) + int(self._nth[place])
        )

    def rows_per_dataset(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each dataset gives."""
        blocks, rest = divmod(rows, MIXTURE_BLOCK)
        self.draw(blocks)
        return [
            blocks * int(share) + int((self._drawn[:rest] == number).sum())
            for number, share in enumerate(self.shares)
        ]


def proportions(weights: Iterable[float]) -> np.ndarray:
    """Rows of each of MIXTURE_BLOCK, by largest remainder. Raises UserError for a weight too small to get one.

    >>> proportions([2, 1]).tolist()
    [667, 333]
    """
    weights = np.array(list(weights), float)
    exact = weights / weights.sum() * MIXTURE_BLOCK
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: MIXTURE_BLOCK - shares.sum()]] += 1
    if not shares.all():
        raise UserError(
            f"data.mixture: a weight of {weights[shares == 0][0]:g} is below a row in {MIXTURE_BLOCK}; raise it or leave it out"
        )
    return shares


class ValidationBatchSampler:
    """Every index once, in order, in batches of one shape: the last is filled up with -1."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [i if i < self.size else -1 for i in range(first, first + self.batch_size)]


class ResumableLoader(DataLoader):
    """A DataLoader over a TrainingOrder or ValidationOrder whose state is the number of batches it handed out."""

    def __init__(
        self,
        dataset: Dataset,
        order: ShuffledBatchSampler | ValidationBatchSampler,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.handed_out = 0
        super().__init__(
            dataset, batch_sampler=order, num_workers=num_workers, pin_memory=pin_memory, **LOADER
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if isinstance(self.batch_sampler, ValidationBatchSampler):
            yield from super().__iter__()
            return
        self.batch_sampler.start = self.handed_out
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.handed_out = state["handed_out"]


def leave_signals_to_the_run(_: int) -> None:
    """A worker process ends when its loader does; Ctrl-C is for the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def as_is(batch: Any) -> Any:
    """The dataset makes whole batches."""
    return batch


LOADER = {
    "collate_fn": as_is,
    "worker_init_fn": leave_signals_to_the_run,
    "generator": torch.Generator(),  # its own: the default would draw from the global generator
}
