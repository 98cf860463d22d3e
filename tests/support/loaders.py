"""Small loaders whose batches end anywhere in epochs and blocks, to test resuming."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from pocketlm.corpus.pieces import Source
from pocketlm.data.datasets import JoinedDataset, PackedLMDataset, RowFormat
from pocketlm.data.samplers import (
    ONLY_PROCESS,
    DataShard,
    MixtureBatchSampler,
    ResumableLoader,
    ShuffledBatchSampler,
)
from pocketlm.data.streaming import StreamingPackedLMDataset, StreamLoader, StreamOptions
from pocketlm.tokenizer.bytes import ByteTokenizer


class Texts(Source):
    """A source of these documents."""

    name = "texts"

    def __init__(self, texts: list[str]):
        self.texts = texts

    def documents(self) -> Iterator[str]:
        return iter(self.texts)


def packed_loader(num_workers: int, rank: DataShard = ONLY_PROCESS) -> ResumableLoader:
    """Return 9 rows in batches of 4: an epoch ends in the third batch, the next in the fifth."""
    dataset = PackedLMDataset(np.arange(44), 5)
    assert len(dataset) == 9
    sampler = ShuffledBatchSampler(9, 4 // rank.count, 3, rank)
    return ResumableLoader(dataset, sampler, num_workers)


def mixture_loader(num_workers: int, rank: DataShard = ONLY_PROCESS) -> ResumableLoader:
    """Return a mixture of 9 and 4 rows, 2 to 1, in batches of 300: a block ends in the fourth."""
    datasets = [PackedLMDataset(np.arange(44), 5), PackedLMDataset(np.arange(100, 120), 5)]
    sampler = MixtureBatchSampler([9, 4], [2, 1], 300 // rank.count, 3, rank)
    return ResumableLoader(JoinedDataset(datasets), sampler, num_workers)


def stream_loader(num_workers: int, padded: bool = False) -> StreamLoader:
    """Return a stream of 40 documents, some longer than a block of 3 rows, in batches of 4."""
    documents = [f"document {i} " + "long " * (i % 10 * 2) for i in range(40)]
    options = StreamOptions(val_share=0.2, seed=11, shuffle_buffer=3)
    row_format = RowFormat(16, padded)
    dataset = StreamingPackedLMDataset(Texts(documents), ByteTokenizer(), row_format, 4, options)
    return StreamLoader(dataset, num_workers)


def padded_stream_loader(num_workers: int) -> StreamLoader:
    """Return the same stream with one document per row."""
    return stream_loader(num_workers, padded=True)


LOADERS = {
    "packed": packed_loader,
    "mixture": mixture_loader,
    "stream": stream_loader,
    "padded stream": padded_stream_loader,
}


def take(loader: ResumableLoader | StreamLoader, count: int) -> list[list[Any]]:
    """Return the inputs and targets of the next batches of a new iterator, as plain lists."""
    batches = islice(iter(loader), count)
    return [[batch["input_ids"].tolist(), batch["targets"].tolist()] for batch in batches]
