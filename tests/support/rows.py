"""Shards and rows made the plain way."""

from pathlib import Path

import numpy as np
import torch

from pocketlm.corpus.chunks import Chunk, is_validation
from pocketlm.data.shard_builder import encode
from pocketlm.data.shards import ShardWriter, TokenShard
from pocketlm.tokenizer.base import Tokenizer


def write_shard(path: Path, tokenizer: Tokenizer, documents: list[str]) -> TokenShard:
    writer = ShardWriter(path, tokenizer)
    writer.write(encode([Chunk(False, document) for document in documents], tokenizer)[False])
    writer.close()
    return TokenShard(path)


Row = tuple[
    list[int], list[int]
]  # tokens that count, and for each input the number of its document within the row


# ---- the same, plainly -----------------------------------------------------------------------------------------------


def numbered(owners: list[int]) -> list[int]:
    """0 for the first document of a row, 1 for the next."""
    return [list(dict.fromkeys(owners)).index(owner) for owner in owners]


def plain_rows(
    documents: list[str], tokenizer: Tokenizer, seq_len: int, *, seed: int, shuffle_buffer: int, padded: bool = False,
    shard: int = 0, shards: int = 1, val_share: float = 0.0, epoch: int = 0,
) -> list[Row]:  # fmt: skip
    """All rows of an epoch of one worker: encode every document, join, cut, and shuffle block by block."""
    mine = [
        text
        for number, text in enumerate(documents)
        if number % shards == shard and not is_validation(text, val_share)
    ]
    encoded = [[*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.closing] for text in mine]
    if padded:
        rows = [([*ids, *tokenizer.final][: seq_len + 1], [0] * seq_len) for ids in encoded]
    else:
        tokens = [i for ids in encoded for i in ids] + tokenizer.final
        owners = [number for number, ids in enumerate(encoded) for _ in ids]
        starts = range(0, len(tokens) - 1, seq_len)
        rows = [
            (tokens[start : start + seq_len + 1], numbered(owners[start : start + seq_len]))
            for start in starts
        ]
    shuffled = []
    for number, begin in enumerate(range(0, len(rows), shuffle_buffer)):
        block = rows[begin : begin + shuffle_buffer]
        shuffled += [
            block[i]
            for i in np.random.default_rng([seed, shard, epoch, number]).permutation(len(block))
        ]
    return [(tokens, owners[: len(tokens) - 1]) for tokens, owners in shuffled]


def as_rows(batch: dict[str, torch.Tensor]) -> list[Row]:
    """The rows of a batch."""
    rows = []
    doc_ids = batch.get("doc_ids", torch.zeros_like(batch["targets"]))
    for inputs, targets, owners in zip(batch["input_ids"], batch["targets"], doc_ids, strict=True):
        n = int((targets != -100).sum())
        assert (targets[n:] == -100).all() and (inputs[n:] == 0).all()
        assert inputs[1:n].tolist() == targets[: max(0, n - 1)].tolist()
        if n:
            rows.append(([int(inputs[0]), *targets[:n].tolist()], numbered(owners[:n].tolist())))
    return rows
