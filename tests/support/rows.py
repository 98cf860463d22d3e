"""Shards and rows made by plain loops, to compare with those of the datasets."""

from pathlib import Path

import numpy as np
import torch

from pocketlm.corpus.chunks import Chunk, is_validation
from pocketlm.data.datasets import RowFormat
from pocketlm.data.samplers import ONLY_PROCESS, DataShard
from pocketlm.data.streaming import StreamOptions
from pocketlm.model.loss import IGNORE_INDEX
from pocketlm.shards.builder import encode_chunks
from pocketlm.shards.format import ShardWriter, TokenShard
from pocketlm.tokenizer.base import Tokenizer

# The tokens of a row, and the number of each input's document within the row.
Row = tuple[list[int], list[int]]


def write_shard(path: Path, tokenizer: Tokenizer, *batches: list[str]) -> TokenShard:
    """Write the documents of all batches to one shard."""
    with ShardWriter(path, tokenizer) as writer:
        for documents in batches:
            chunks = [Chunk("train", document) for document in documents]
            writer.write(encode_chunks(chunks, tokenizer)["train"])
        writer.close()
    return TokenShard(path)


def renumber(documents: list[int]) -> list[int]:
    """Return 0 for the first document of a row, 1 for the next, and so on."""
    order = list(dict.fromkeys(documents))
    return [order.index(document) for document in documents]


def stream_rows(
    documents: list[str],
    tokenizer: Tokenizer,
    row_format: RowFormat,
    options: StreamOptions,
    worker: DataShard = ONLY_PROCESS,
    epoch: int = 0,
) -> list[Row]:
    """Return all rows of an epoch of one worker of a stream, without its generators.

    Encode every document, join, cut into rows, and shuffle block by block.
    """
    encoded = []
    for number, text in enumerate(documents):
        if number % worker.count == worker.index and not is_validation(text, options.val_share):
            prefix, suffix = tokenizer.document_prefix, tokenizer.document_suffix
            encoded.append([*prefix, *tokenizer.encode(text), *suffix])
    make_rows = padded_rows if row_format.padded else packed_rows
    rows = make_rows(encoded, tokenizer, row_format.seq_len)
    shuffled = []
    for number, start in enumerate(range(0, len(rows), options.shuffle_buffer)):
        block = rows[start : start + options.shuffle_buffer]
        generator = np.random.default_rng([options.seed, worker.index, epoch, number])
        shuffled += [block[i] for i in generator.permutation(len(block))]
    return [(tokens, owners[: len(tokens) - 1]) for tokens, owners in shuffled]


def packed_rows(encoded: list[list[int]], tokenizer: Tokenizer, seq_len: int) -> list[Row]:
    """Return the windows of all documents laid end to end."""
    tokens = [i for ids in encoded for i in ids] + tokenizer.corpus_suffix
    owners = [number for number, ids in enumerate(encoded) for _ in ids]
    return [
        (tokens[start : start + seq_len + 1], renumber(owners[start : start + seq_len]))
        for start in range(0, len(tokens) - 1, seq_len)
    ]


def padded_rows(encoded: list[list[int]], tokenizer: Tokenizer, seq_len: int) -> list[Row]:
    """Return one row for each document; one of a single token has no target, and no row."""
    texts = [[*ids, *tokenizer.corpus_suffix] for ids in encoded]
    return [(tokens[: seq_len + 1], [0] * seq_len) for tokens in texts if len(tokens) > 1]


def rows_of_batch(batch: dict[str, torch.Tensor]) -> list[Row]:
    """Return the rows of a batch that have targets."""
    rows = []
    doc_ids = batch.get("doc_ids", torch.zeros_like(batch["targets"]))
    for inputs, targets, owners in zip(batch["input_ids"], batch["targets"], doc_ids, strict=True):
        n = int((targets != IGNORE_INDEX).sum())
        assert (targets[n:] == IGNORE_INDEX).all()
        assert (inputs[n:] == 0).all()
        assert inputs[1:n].tolist() == targets[: max(0, n - 1)].tolist()
        if n:
            rows.append(([int(inputs[0]), *targets[:n].tolist()], renumber(owners[:n].tolist())))
    return rows


def kept_targets(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    """Return all targets of the batches that count, in order."""
    targets: list[int] = []
    for batch in batches:
        targets += batch["targets"][batch["targets"] != IGNORE_INDEX].tolist()
    return targets
