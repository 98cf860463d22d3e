"""Token files of other programs: the `.bin` files of nanoGPT and llm.c, read and written.

nanoGPT's files are uint16 tokens and nothing else. llm.c's have a header of 256 int32 before the
tokens: magic number, version, count (see its dev/data/data_common.py).
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketlm.corpus.chunks import Split
from pocketlm.errors import UserError
from pocketlm.shards.format import MAGIC, EncodedBatch, TokenShard
from pocketlm.tokenizer.base import Tokenizer

LLMC_FORMATS = {"<u2": (20240520, 1), "<u4": (20240801, 7)}  # dtype: (magic number, version)
LLMC_HEADER_BYTES = 1024

CONTEXT_IDS = 16  # more ids than any character has


# ---- reading ----


def read_bin(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens of a `.bin` file of nanoGPT or llm.c, or of a shard, memory-mapped.

    Raises UserError if the file is damaged or was made with another tokenizer.
    """
    if path.suffix.lower() != ".bin":
        raise UserError(f"{path} is compressed, and token files are memory-mapped; decompress it")
    with path.open("rb") as file:
        head = file.read(12)
    if head[:8] == MAGIC:
        shard = TokenShard(path)
        if shard.header.tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"the token shard {path} was made with another tokenizer than {tokenizer.name!r}; "
                "set data.tokenizer to it"
            )
        return np.asarray(shard.tokens)
    magic, version, count = struct.unpack("<3i", head) if len(head) == 12 else (0, 0, 0)
    for dtype, (llmc_magic, llmc_version) in LLMC_FORMATS.items():
        if magic == llmc_magic:
            if version != llmc_version:
                raise UserError(
                    f"{path} is an llm.c file of version {version}; "
                    f"this program reads {llmc_version}"
                )
            return read_llmc(path, dtype, count)
    return read_nanogpt(path)


def read_llmc(path: Path, dtype: str, count: int) -> np.ndarray:
    """Return the `count` tokens of an llm.c file, memory-mapped."""
    size = path.stat().st_size
    expected = LLMC_HEADER_BYTES + count * np.dtype(dtype).itemsize
    if size != expected:
        raise UserError(
            f"{path} is truncated or damaged: its header says {count} tokens, {expected} bytes; "
            f"it has {size}"
        )
    if not count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", LLMC_HEADER_BYTES, (count,))


def read_nanogpt(path: Path) -> np.ndarray:
    """Return the tokens of a nanoGPT file, memory-mapped."""
    size = path.stat().st_size
    if size % 2:
        raise UserError(
            f"{path} has {size} bytes, an odd number; nanoGPT's files hold uint16 tokens. "
            "It is truncated, or not a token file"
        )
    return np.memmap(path, "<u2", "r") if size else np.empty(0, "<u2")


# ---- token files -> batches ----


@dataclass(frozen=True)
class TokenBatch:
    """Consecutive ids of token files."""

    split: Split
    ids: np.ndarray
    context: np.ndarray  # up to CONTEXT_IDS ids of the same split before them
    is_first: bool  # of its split
    is_last: bool


def token_batches(
    files: list[Path], tokenizer: Tokenizer, val_share: float, size: int
) -> Iterator[TokenBatch]:
    """Yield the ids of token files in batches of about `size`; the last `val_share` is validation.

    Raises UserError for an id that the tokenizer does not have.
    """
    arrays = [read_bin(file, tokenizer) for file in files]
    total = sum(map(len, arrays))
    border = int(total * (1 - val_share))
    bounds: dict[Split, tuple[int, int]] = {"train": (0, border), "val": (border, total)}
    context: dict[Split, np.ndarray] = dict.fromkeys(bounds, np.empty(0, tokenizer.dtype))
    position = 0
    for file, array in zip(files, arrays, strict=True):
        for start in range(0, len(array), size):
            ids = np.asarray(array[start : start + size])
            check_ids(file, ids, start, tokenizer)
            for split, (first, last) in bounds.items():
                low, high = max(position, first), min(position + len(ids), last)
                if low < high:
                    part = ids[low - position : high - position]
                    yield TokenBatch(split, part, context[split], low == first, high == last)
                    recent = np.concatenate([context[split], part[-CONTEXT_IDS:]])
                    context[split] = recent[-CONTEXT_IDS:]
            position += len(ids)


def check_ids(file: Path, ids: np.ndarray, start: int, tokenizer: Tokenizer) -> None:
    """Raise UserError for an id outside the vocabulary; `start` is the index of the first id."""
    wrong = np.flatnonzero(ids >= tokenizer.vocab_size)
    if wrong.size:
        raise UserError(
            f"{file} holds the id {ids[wrong[0]]} as its token {start + wrong[0]}, but the "
            f"vocabulary of the tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids; "
            "set data.tokenizer to the one that made the file"
        )


def encode_tokens(batch: TokenBatch, tokenizer: Tokenizer) -> dict[Split, EncodedBatch]:
    """Return the batch as tokens for a shard.

    A document starts at each bos or, if the tokenizer has none, at each eos except the last.
    """
    ids = batch.ids
    if batch.is_last and tokenizer.corpus_suffix and ids[-1] == tokenizer.corpus_suffix[0]:
        ids = ids[:-1]  # ShardWriter adds it
    if tokenizer.document_prefix:
        starts = np.flatnonzero(ids == tokenizer.document_prefix[0])
    else:
        starts = np.empty(0, np.int64)
    if batch.is_first and 0 not in starts[:1]:
        starts = np.append(0, starts)
    # A batch may begin or end inside a character, so its bytes are counted with its context.
    before = tokenizer.decode(batch.context.tolist())
    after = tokenizer.decode(np.concatenate([batch.context, ids]).tolist())
    size = len(after.encode()) - len(before.encode())
    return {batch.split: EncodedBatch(ids, starts, size)}


# ---- writing ----


def write_bin(path: Path, shard: TokenShard, program: str) -> None:
    """Write the shard's tokens in the format of `program`, nanogpt or llmc.

    The file appears only once it is complete. Raises UserError if the format cannot hold the
    tokens.
    """
    header = shard.header
    if program == "nanogpt" and header.dtype != "<u2":
        raise UserError(
            "nanoGPT's files hold ids up to 65,535, and this tokenizer has more; "
            f"write {path.stem} as llmc"
        )
    if program == "llmc" and header.tokens >= 2**31:
        raise UserError(
            f"llm.c's header counts up to 2,147,483,647 tokens; {path.stem} has {header.tokens:,}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            if program == "llmc":
                head = struct.pack("<3i", *LLMC_FORMATS[header.dtype], header.tokens)
                file.write(head.ljust(LLMC_HEADER_BYTES, b"\0"))
            for start in range(0, header.tokens, 2**20):
                file.write(shard.tokens[start : start + 2**20].data)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
