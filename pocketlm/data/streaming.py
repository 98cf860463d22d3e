"""Streaming: rows without token shards; text is tokenised and packed while training.

    chunks -> tokens -> packed or padded rows -> blocks -> rows, shuffled -> batches -> StreamLoader

Each step is a generator over the step before it. All of them can start at any StreamPosition, so
that a run resumes exactly: the block of that position is made again and its first rows are skipped.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pocketlm.corpus.chunks import Chunk, at_token_boundaries, batch_chunks, split_documents
from pocketlm.corpus.pieces import Source
from pocketlm.data.datasets import Batch, RowFormat, as_batch
from pocketlm.data.samplers import ENDLESS, LOADER_OPTIONS, ONLY_PROCESS, DataShard
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer

STREAM_BATCH = 2**18  # characters tokenised at a time

# A token id, the number of its document among its worker's documents, and its index in there.
TOKEN = np.dtype([("id", "<u4"), ("document", "<i8"), ("index", "<i8")])


@dataclass(frozen=True)
class StreamPosition:
    """Resume state of one worker: the start of its current block, and the rows yielded from it.

    A block starts at a token: number `index` of number `document` of the worker's documents. The
    names of the fields are keys in checkpoints.
    """

    epoch: int = 0
    block: int = 0
    row: int = 0
    document: int = 0
    index: int = 0


@dataclass(frozen=True)
class StreamOptions:
    """Options of a stream: its documents, and how their rows are shuffled."""

    val_share: float = 0.0  # share of the documents that are left out, for validation
    seed: int = 0
    shuffle_buffer: int = 1000  # rows in a block; rows are shuffled within their block
    epochs: int | None = None  # None: without end


StreamItem = tuple[int, StreamPosition, Batch | UserError]


class StreamingPackedLMDataset(IterableDataset[StreamItem]):
    """The rows of PackedLMDataset, or of PaddedLMDataset, from a source that has no shards.

    Documents are numbered as they come, and document n belongs to worker n modulo W. An epoch has
    each training document once, ends in a short row, and is followed by the next epoch.

    Yields (worker, StreamPosition after the batch, batch).
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        row_format: RowFormat,
        batch_size: int,
        options: StreamOptions | None = None,
    ):
        self.source, self.tokenizer = source, tokenizer
        self.row_format, self.batch_size = row_format, batch_size
        self.options = options or StreamOptions()
        self.positions: list[StreamPosition] = []  # of each worker; empty: start at the beginning
        self.next_worker = 0  # yields the first batch

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[StreamItem]:
        info = get_worker_info()
        if info is None:
            yield from self.batches(0, 1)
            return
        # torch asks its worker 0 first, so that one takes the part of `next_worker`.
        worker = (info.id + self.next_worker) % info.num_workers
        try:
            yield from self.batches(worker, info.num_workers)
        except UserError as error:  # torch would add a traceback to an error that is raised
            yield info.id, StreamPosition(), error

    def batches(self, worker: int, workers: int) -> Iterator[tuple[int, StreamPosition, Batch]]:
        """Yield the batches of one worker."""
        position = self.positions[worker] if self.positions else StreamPosition()
        rows = self.rows(DataShard(worker, workers), position)
        while batch := list(islice(rows, self.batch_size)):
            yield worker, batch[-1][0], self.as_batch([row for _, row in batch])

    def as_batch(self, rows: list[np.ndarray]) -> Batch:
        """Return rows of TOKEN as a batch."""
        seq_len = self.row_format.seq_len
        windows = np.zeros((len(rows), seq_len + 1), np.int64)
        doc_ids = np.full((len(rows), seq_len), -1)
        for number, row in enumerate(rows):
            windows[number, : len(row)] = row["id"]
            doc_ids[number, : len(row)] = row["document"][:seq_len]
        masked = self.row_format.document_mask and not self.row_format.padded
        return as_batch(windows, np.array(list(map(len, rows))), doc_ids if masked else None)

    def rows(
        self, shard: DataShard, position: StreamPosition
    ) -> Iterator[tuple[StreamPosition, np.ndarray]]:
        """Yield the rows from `position` on, each with the position after it."""
        epochs = self.options.epochs
        while epochs is None or position.epoch < epochs:
            start = None
            for start, block in self.blocks(shard, position):
                seed = [self.options.seed, shard.index, start.epoch, start.block]
                order = np.random.default_rng(seed).permutation(len(block))
                for row in range(start.row, len(block)):
                    yield replace(start, row=row + 1), block[order[row]]
            if start is None:
                raise self._too_few_documents_error(shard.count)
            position = StreamPosition(position.epoch + 1)

    def blocks(
        self, shard: DataShard, position: StreamPosition
    ) -> Iterator[tuple[StreamPosition, list[np.ndarray]]]:
        """Yield the rest of the epoch in blocks, each with the position at which it starts."""
        make_rows = padded_rows if self.row_format.padded else packed_rows
        rows = make_rows(self.tokens(shard, position), self.row_format.seq_len)
        while block := list(islice(rows, self.options.shuffle_buffer)):
            first = block[0][0]
            document, index = int(first["document"]), int(first["index"])
            yield replace(position, document=document, index=index), block
            position = StreamPosition(position.epoch, position.block + 1)

    def tokens(self, shard: DataShard, position: StreamPosition) -> Iterator[np.ndarray]:
        """Yield the tokens from the start of the block on, in arrays (n,) of TOKEN."""
        dtype = self.tokenizer.dtype
        prefix = np.array(self.tokenizer.document_prefix, dtype)
        suffix = np.array(self.tokenizer.document_suffix, dtype)
        corpus_suffix = np.array(self.tokenizer.corpus_suffix, dtype)
        if self.row_format.padded:  # no prefix of a next document ends this one
            suffix, corpus_suffix = np.concatenate([suffix, corpus_suffix]), corpus_suffix[:0]
        document, index = position.document - 1, 0
        chunks = at_token_boundaries(self.chunks(shard, position.document), self.tokenizer)
        for batch in batch_chunks(chunks, STREAM_BATCH):
            encoded = self.tokenizer.encode_arrays([chunk.text for chunk in batch])
            arrays = []
            for chunk, ids in zip(batch, encoded, strict=True):
                if chunk.starts_document:
                    document, index = document + 1, 0
                before = prefix if chunk.starts_document else prefix[:0]
                after = suffix if chunk.ends_document else suffix[:0]
                arrays.append(as_tokens([before, ids, after], document, index))
                index += len(arrays[-1])
            tokens = np.concatenate(arrays)
            in_later_document = tokens["document"] > position.document
            yield tokens[in_later_document | (tokens["index"] >= position.index)]
        yield as_tokens([corpus_suffix], document, index)

    def chunks(self, shard: DataShard, first: int) -> Iterator[Chunk]:
        """Yield the text of one worker's documents, from its document number `first` on."""
        number = own_number = -1
        for chunk in split_documents(self.source.pieces(), self.options.val_share):
            number += chunk.starts_document
            if number % shard.count == shard.index and chunk.split == "train":
                own_number += chunk.starts_document
                if own_number >= first:
                    yield chunk

    def check_documents(self, workers: int) -> None:
        """Raise UserError unless each worker has a document to train on."""
        without = set(range(workers))
        number = -1
        for chunk in split_documents(self.source.pieces(), self.options.val_share):
            number += chunk.starts_document
            if chunk.split == "train":
                without.discard(number % workers)
            if not without:
                return
        raise self._too_few_documents_error(workers)

    def _too_few_documents_error(self, workers: int) -> UserError:
        return UserError(
            f"{self.source.name} has too few documents to train on for {workers} workers; "
            "lower hardware.num_workers"
        )


def as_tokens(ids: list[np.ndarray], document: int, index: int) -> np.ndarray:
    """Return ids as TOKENs of a document, from its token number `index` on."""
    joined = np.concatenate(ids)
    tokens = np.empty(len(joined), TOKEN)
    tokens["id"], tokens["document"] = joined, document
    tokens["index"] = np.arange(index, index + len(joined))
    return tokens


def packed_rows(tokens: Iterator[np.ndarray], seq_len: int) -> Iterator[np.ndarray]:
    """Yield windows of T + 1 tokens at stride T; the last one may be short."""
    pending = np.empty(0, TOKEN)
    for more in tokens:
        pending = np.concatenate([pending, more])
        for start in range(0, len(pending) - seq_len, seq_len):
            yield pending[start : start + seq_len + 1]
        pending = pending[(len(pending) - 1) // seq_len * seq_len :]
    if len(pending) > 1:  # a single token has been a target already
        yield pending


def padded_rows(tokens: Iterator[np.ndarray], seq_len: int) -> Iterator[np.ndarray]:
    """Yield one document per row, truncated to T + 1 tokens, if it has a target."""
    pending = np.empty(0, TOKEN)
    for more in tokens:
        pending = np.concatenate([pending, more[more["index"] <= seq_len]])
        *complete, pending = np.split(pending, np.flatnonzero(pending["index"] == 0)[1:])
        yield from (row for row in complete if len(row) > 1)
    if len(pending) > 1:
        yield pending


@dataclass(frozen=True)
class StepShare:
    """One rank's share of the rows of a step, which has `batches` batches of the stream.

    The rank trains on `rows` of them at a time, in the places that `ShuffledBatchSampler` gives it.
    """

    batches: int = 1
    rows: int = 1
    rank: DataShard = ONLY_PROCESS

    def of(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """Yield this rank's rows of the batches of all ranks."""
        if self.rank.count == 1:
            yield from stream
        while step := list(islice(stream, self.batches)):
            joined = {name: torch.cat([batch[name] for batch in step]) for name in step[0]}
            size, stride = len(joined["targets"]), self.rank.count * self.rows
            for first in range(self.rank.index * self.rows, size, stride):
                yield {name: values[first : first + self.rows] for name, values in joined.items()}


class StreamLoader(DataLoader[Batch]):
    """A DataLoader over a stream, whose state is the position of each worker.

    The state also has the worker whose turn is next, because workers yield batches in turn. Every
    rank reads and tokenises the whole stream and takes its share of each step, so that neither
    the order nor the state depends on the number of ranks.
    """

    def __init__(
        self,
        dataset: StreamingPackedLMDataset,
        num_workers: int = 0,
        pin_memory: bool = False,
        step: StepShare | None = None,
    ):
        workers = max(1, num_workers)
        dataset.check_documents(workers)
        self.stream, self.step = dataset, step or StepShare()
        self.positions, self.next_worker = [StreamPosition()] * workers, 0
        super().__init__(
            dataset,  # type: ignore[arg-type]  # items carry a batch: see `__iter__`
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            **LOADER_OPTIONS,
        )

    # torch's annotation names its private iterator class.
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return self.step.of(self._all_batches())

    def _all_batches(self) -> Iterator[Batch]:
        """Yield the batches of all ranks."""
        self.stream.positions, self.stream.next_worker = list(self.positions), self.next_worker
        for worker, position, batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            self.positions[worker] = position
            self.next_worker = (worker + 1) % len(self.positions)
            yield batch

    # The keys are those of checkpoints; earlier versions had a list with the state of every rank.

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, which any number of ranks can resume."""
        places = [asdict(position) for position in self.positions]
        own = {"places": places, "turn": self.next_worker}
        return {"num_workers": self.num_workers, "ranks": [own]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a state. Raises UserError if it has another number of workers."""
        if state["num_workers"] != self.num_workers:
            raise UserError(
                "a stream resumes only with the workers that it began with: set "
                f"hardware.num_workers to {state['num_workers']}, not {self.num_workers}"
            )
        if len(state["ranks"]) > 1:
            raise UserError(
                "an earlier version dealt the documents of this stream out to "
                f"{len(state['ranks'])} devices, and only that version can resume it; begin "
                "another run: run.name=NAME"
            )
        [own] = state["ranks"]
        self.positions = [StreamPosition(**position) for position in own["places"]]
        self.next_worker = own["turn"]
