"""Token files of other programs: nanoGPT's and llm.c's."""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketlm.data.shards import CONTEXT, MAGIC, EncodedBatch, TokenShard
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer

LLMC = {"<u2": (20240520, 1), "<u4": (20240801, 7)}  # magic, version


LLMC_HEADER_BYTES = 1024


# ---- other programs' files -------------------------------------------------------------------------------------------


def read_bin(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a `.bin` file of nanoGPT or llm.c, or of a shard, memory-mapped. Raises UserError for a broken one."""
    if path.suffix.lower() != ".bin":
        raise UserError(
            f"{path} is compressed, and token files are read where they lie; decompress it"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
    if head[:8] == MAGIC:
        shard = TokenShard(path)
        if shard.header.tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"the token shard {path} was made with another tokenizer than {tokenizer.name!r}; set data.tokenizer to it"
            )
        return shard.tokens
    magic, version, count = struct.unpack("<3i", head) if len(head) == 12 else (0, 0, 0)
    for dtype, (its_magic, its_version) in LLMC.items():
        if magic == its_magic:
            if version != its_version:
                raise UserError(
                    f"{path} is an llm.c file of version {version}; this program reads {its_version}"
                )
            expected = LLMC_HEADER_BYTES + count * np.dtype(dtype).itemsize
            if size != expected:
                raise UserError(
                    f"{path} is truncated or damaged: its header says {count} tokens, {expected} bytes; it has {size}"
                )
            return (
                np.memmap(path, dtype, "r", LLMC_HEADER_BYTES, (count,))
                if count
                else np.empty(0, dtype)
            )
    if size % 2:
        raise UserError(
            f"{path} has {size} bytes, an odd number; nanoGPT's files hold uint16 tokens. It is truncated, or something else"
        )
    return np.memmap(path, "<u2", "r") if size else np.empty(0, "<u2")


@dataclass(frozen=True)
class TokenBatch:
    """Consecutive ids out of token files."""

    validation: bool
    ids: np.ndarray
    before: np.ndarray  # some ids that stand before them
    first: bool  # of the training or validation part
    last: bool


def token_batches(
    files: list[Path], tokenizer: Tokenizer, share: float, size: int
) -> Iterator[TokenBatch]:
    """Token files in batches of about `size` ids; their last `share` is validation. Raises UserError for an id too large."""
    arrays = [read_bin(file, tokenizer) for file in files]
    total = sum(map(len, arrays))
    border, position = int(total * (1 - share)), 0
    before = dict.fromkeys((False, True), np.empty(0, tokenizer.dtype))
    for file, array in zip(files, arrays, strict=True):
        for start in range(0, len(array), size):
            ids = np.asarray(array[start : start + size])
            if (wrong := np.flatnonzero(ids >= tokenizer.vocab_size)).size:
                raise UserError(
                    f"{file} holds the id {ids[wrong[0]]} as its token {start + wrong[0]}, but the tokenizer {tokenizer.name!r} has "
                    f"{tokenizer.vocab_size} entries; set data.tokenizer to the one that made the file"
                )
            end = position + len(ids)
            for validation, low, high in (
                (False, position, min(end, border)),
                (True, max(position, border), end),
            ):
                if low < high:
                    part = ids[low - position : high - position]
                    first, last = (
                        low == (border if validation else 0),
                        high == (total if validation else border),
                    )
                    yield TokenBatch(validation, part, before[validation], first, last)
                    before[validation] = np.concatenate([before[validation], part[-CONTEXT:]])[
                        -CONTEXT:
                    ]
            position = end


def encode_tokens(batch: TokenBatch, tokenizer: Tokenizer) -> dict[bool, EncodedBatch]:
    """The batch for its part of the corpus: a document begins at each bos or, without one, at each eos but the last."""
    ids = batch.ids
    if batch.last and tokenizer.final and ids[-1] == tokenizer.final[0]:
        ids = ids[:-1]  # which ShardWriter adds
    begins = (
        np.flatnonzero(ids == tokenizer.prefix[0]) if tokenizer.prefix else np.empty(0, np.int64)
    )
    if batch.first and 0 not in begins[:1]:
        begins = np.append(0, begins)
    before, together = (
        tokenizer.decode(i.tolist()) for i in (batch.before, np.concatenate([batch.before, ids]))
    )
    return {
        batch.validation: EncodedBatch(ids, begins, len(together.encode()) - len(before.encode()))
    }


def write_bin(path: Path, shard: TokenShard, form: str) -> None:
    """The shard's tokens as a file of `form` nanogpt or llmc, whole or not at all."""
    if form == "nanogpt" and shard.header.dtype != "<u2":
        raise UserError(
            f"nanoGPT's files hold ids up to 65,535, and this tokenizer has more; write {path.stem} as llmc"
        )
    if form == "llmc" and shard.header.tokens >= 2**31:
        raise UserError(
            f"llm.c's header counts up to 2,147,483,647 tokens; {path.stem} has {shard.header.tokens:,}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            if form == "llmc":
                file.write(
                    struct.pack("<3i", *LLMC[shard.header.dtype], shard.header.tokens).ljust(
                        LLMC_HEADER_BYTES, b"\0"
                    )
                )
            for start in range(0, shard.header.tokens, 2**20):
                file.write(shard.tokens[start : start + 2**20].data)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
