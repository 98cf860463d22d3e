"""Rows without shards: text is tokenised and packed while training, in an order that can be resumed exactly.

    chunks -> tokens -> packed or padded rows -> blocks -> rows, shuffled -> batches -> StreamLoader

Each step is a generator over the one before it, and begins wherever a Place says.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pocketlm.corpus.chunks import Chunk, at_token_boundaries, batch_chunks, split
from pocketlm.corpus.pieces import Source
from pocketlm.data.datasets import as_batch
from pocketlm.data.samplers import ENDLESS, LOADER
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer

STREAM_BATCH = 2**18  # characters tokenised at a time


TOKEN = np.dtype(
    [("id", "<u4"), ("document", "<i8"), ("index", "<i8")]
)  # its worker's document, and where in that it stands


@dataclass(frozen=True)
class StreamPosition:
    """How far a worker is: the rows it has dealt of a block, and the token of its documents at which the block begins."""

    epoch: int = 0
    block: int = 0
    row: int = 0
    document: int = 0
    index: int = 0


class StreamingPackedLMDataset(IterableDataset):
    """PackedLMDataset's rows (`padded`: PaddedLMDataset's) without shards, shuffled in blocks of `shuffle_buffer` rows.

    Documents are numbered as they come; worker w of W on rank r of R has those of number r*W + w modulo R*W that are not
    validation. An epoch holds each of them once, ends in a short row, and is followed by the next, unless `epochs` says
    when to stop. Yields (worker, Place behind the batch, batch). A Place is all that resuming needs: its block is made again.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        seq_len: int,
        batch_size: int,
        *,
        val_share: float = 0.0,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        document_mask: bool = False,
        padded: bool = False,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
    ):
        self.source, self.tokenizer, self.seq_len, self.batch_size = (
            source,
            tokenizer,
            seq_len,
            batch_size,
        )
        self.val_share, self.seed, self.shuffle_buffer, self.document_mask = (
            val_share,
            seed,
            shuffle_buffer,
            document_mask,
        )
        self.padded, self.rank, self.world_size, self.epochs = padded, rank, world_size, epochs
        self.places: list[
            StreamPosition
        ] = []  # of each worker, to go on from; none: from the beginning
        self.turn = 0  # the worker that gives the first batch

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[tuple[int, StreamPosition, dict[str, Tensor] | UserError]]:
        info = get_worker_info()
        if info is None:
            yield from self.batches(0, 1)
            return
        try:  # torch asks its worker 0 first
            yield from self.batches((info.id + self.turn) % info.num_workers, info.num_workers)
        except UserError as error:  # torch would put a traceback into a raised one
            yield info.id, StreamPosition(), error

    def batches(
        self, worker: int, workers: int
    ) -> Iterator[tuple[int, StreamPosition, dict[str, Tensor]]]:
        place = self.places[worker] if self.places else StreamPosition()
        rows = self.rows(self.rank * workers + worker, self.world_size * workers, place)
        while batch := list(islice(rows, self.batch_size)):
            yield worker, batch[-1][0], self.as_batch([row for _, row in batch])

    def as_batch(self, rows: list[np.ndarray]) -> dict[str, Tensor]:
        windows = np.zeros((len(rows), self.seq_len + 1), np.int64)
        doc_ids = np.full((len(rows), self.seq_len), -1)
        for number, row in enumerate(rows):
            windows[number, : len(row)] = row["id"]
            doc_ids[number, : len(row)] = row["document"][: self.seq_len]
        return as_batch(
            windows,
            np.array(list(map(len, rows))),
            doc_ids if self.document_mask and not self.padded else None,
        )

    def rows(
        self, shard: int, shards: int, place: StreamPosition
    ) -> Iterator[tuple[StreamPosition, np.ndarray]]:
        """The rows from `place` on, each with the place behind it: up to T + 1 tokens."""
        while self.epochs is None or place.epoch < self.epochs:
            begin = None
            for begin, block in self.blocks(shard, shards, place):
                order = np.random.default_rng(
                    [self.seed, shard, begin.epoch, begin.block]
                ).permutation(len(block))
                for row in range(begin.row, len(block)):
                    yield replace(begin, row=row + 1), block[order[row]]
            if begin is None:
                raise self.too_few(shards)
            place = StreamPosition(place.epoch + 1)

    def blocks(
        self, shard: int, shards: int, place: StreamPosition
    ) -> Iterator[tuple[StreamPosition, list[np.ndarray]]]:
        """The rest of the epoch in lists of `shuffle_buffer` rows, each with the place at which it begins."""
        tokens = self.tokens(shard, shards, place)
        rows = (
            padded_rows(tokens, self.seq_len) if self.padded else packed_rows(tokens, self.seq_len)
        )
        while block := list(islice(rows, self.shuffle_buffer)):
            first = block[0][0]
            yield replace(place, document=int(first["document"]), index=int(first["index"])), block
            place = StreamPosition(place.epoch, place.block + 1)

    def tokens(self, shard: int, shards: int, place: StreamPosition) -> Iterator[np.ndarray]:
        """The tokens from the beginning of the block on, in arrays (n,) of TOKEN."""
        tokenizer = self.tokenizer
        prefix, closing, final = (
            np.array(ids, tokenizer.dtype)
            for ids in (tokenizer.prefix, tokenizer.closing, tokenizer.final)
        )
        if self.padded:  # a row of its own: no next document's prefix closes it
            closing, final = np.concatenate([closing, final]), final[:0]
        document, index = place.document - 1, 0
        for batch in batch_chunks(
            at_token_boundaries(self.chunks(shard, shards, place.document), tokenizer), STREAM_BATCH
        ):
            arrays = []
            for chunk, ids in zip(
                batch, tokenizer.encode_arrays([chunk.text for chunk in batch]), strict=True
            ):
                if chunk.begins:
                    document, index = document + 1, 0
                arrays.append(
                    as_tokens(
                        [prefix] * chunk.begins + [ids] + [closing] * chunk.ends, document, index
                    )
                )
                index += len(arrays[-1])
            tokens = np.concatenate(arrays)
            yield tokens[(tokens["document"] > place.document) | (tokens["index"] >= place.index)]
        yield as_tokens([final], document, index)

    def chunks(self, shard: int, shards: int, first: int) -> Iterator[Chunk]:
        """The text of one worker's documents, from its number `first` on."""
        number = mine = -1
        for chunk in split(self.source.pieces(), self.val_share, None):
            number += chunk.begins
            if number % shards == shard and not chunk.validation:
                mine += chunk.begins
                if mine >= first:
                    yield chunk

    def check_documents(self, shards: int) -> None:
        """Raise UserError unless each of so many workers has a document."""
        without = set(range(shards))
        for number, chunk in enumerate(
            chunk for chunk in split(self.source.pieces(), self.val_share, None) if chunk.begins
        ):
            if not chunk.validation:
                without.discard(number % shards)
            if not without:
                return
        raise self.too_few(shards)

    def too_few(self, shards: int) -> UserError:
        return UserError(
            f"{self.source.name} has too few documents to train on for {shards} workers; lower hardware.num_workers or hardware.devices"
        )


def as_tokens(ids: list[np.ndarray], document: int, index: int) -> np.ndarray:
    """The ids one after another as TOKENs of a document, from its token `index` on."""
    joined = np.concatenate(ids)
    tokens = np.empty(len(joined), TOKEN)
    tokens["id"], tokens["document"], tokens["index"] = (
        joined,
        document,
        np.arange(index, index + len(joined)),
    )
    return tokens


def packed_rows(tokens: Iterator[np.ndarray], seq_len: int) -> Iterator[np.ndarray]:
    """Windows of T + 1 tokens at stride T; the last one is short."""
    held = np.empty(0, TOKEN)
    for more in tokens:
        held = np.concatenate([held, more])
        for start in range(0, len(held) - seq_len, seq_len):
            yield held[start : start + seq_len + 1]
        held = held[(len(held) - 1) // seq_len * seq_len :]
    if len(held) > 1:  # a single token has been a target
        yield held


def padded_rows(tokens: Iterator[np.ndarray], seq_len: int) -> Iterator[np.ndarray]:
    """A document a row, cut off at T + 1 tokens."""
    held = np.empty(0, TOKEN)
    for more in tokens:
        held = np.concatenate([held, more[more["index"] <= seq_len]])
        *whole, held = np.split(held, np.flatnonzero(held["index"] == 0)[1:])
        yield from whole
    if len(held):
        yield held


class StreamLoader(DataLoader):
    """A DataLoader over a stream. Its state is the place of each worker of each rank, and whose turn it is."""

    def __init__(
        self, dataset: StreamingPackedLMDataset, num_workers: int = 0, pin_memory: bool = False
    ):
        dataset.check_documents(dataset.world_size * max(1, num_workers))
        super().__init__(
            dataset, batch_size=None, num_workers=num_workers, pin_memory=pin_memory, **LOADER
        )
        self.places, self.turn = [StreamPosition()] * max(1, num_workers), 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.dataset.places, self.dataset.turn = list(self.places), self.turn
        for worker, place, batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            self.places[worker], self.turn = place, (worker + 1) % len(self.places)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """That of every rank, since one of them writes the checkpoint."""
        mine = {"places": [asdict(place) for place in self.places], "turn": self.turn}
        ranks = [mine] * self.dataset.world_size
        if len(ranks) > 1:
            torch.distributed.all_gather_object(ranks, mine)
        return {"num_workers": self.num_workers, "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, before, now in (
            ("hardware.num_workers", state["num_workers"], self.num_workers),
            ("hardware.devices", len(state["ranks"]), self.dataset.world_size),
        ):
            if before != now:
                raise UserError(
                    f"a stream goes on only as it was dealt out: set {key} to {before}, not {now}"
                )
        mine = state["ranks"][self.dataset.rank]
        self.places, self.turn = [StreamPosition(**place) for place in mine["places"]], mine["turn"]
