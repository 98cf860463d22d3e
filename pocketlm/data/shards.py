"""Tokens on disk: the shards that training reads, and the `.bin` files of nanoGPT and llm.c, read and written.

A shard is MAGIC, a header, the tokens, and for each document the index of the token it begins with. nanoGPT's files are
uint16 tokens and nothing else; llm.c's have 256 int32 before them: magic, version, count (its dev/data/data_common.py).
"""

import hashlib
import json
import os
import shutil
import struct
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer

MAGIC = b"TOKSHARD"


HEADER_BYTES = 1024


CONTEXT = 16  # ids, more than any character has


@dataclass(frozen=True)
class ShardHeader:
    """What stands before the tokens; `sha256` is that of the tokens, the offsets behind them, and the other fields."""

    dtype: str  # "<u2", or "<u4" for a vocabulary above 65,536
    tokens: int
    documents: int
    bytes: int  # UTF-8 bytes of the documents' text
    sha256: str
    tokenizer: str  # fingerprint
    version: int = 1

    def digest(self, content: Any) -> str:
        """The SHA-256 of a shard of this header, given that of its tokens and offsets so far."""
        content.update(json.dumps(asdict(self) | {"sha256": ""}).encode())
        return content.hexdigest()


class TokenShard:
    """A shard, memory-mapped. A document begins with the token before its text: bos, or the eos of the one before it.

    Raises UserError by name for a file that is missing, foreign, truncated or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                head = file.read(HEADER_BYTES)
                if head[:8] != MAGIC:
                    raise UserError(f"{path} is not a token shard; delete it to prepare it again")
                (length,) = struct.unpack("<I", head[8:12])
                fields = json.loads(head[12 : 12 + length])
                if fields["version"] != ShardHeader.version:
                    raise UserError(
                        f"{path} is a token shard of version {fields['version']}; this program reads {ShardHeader.version}"
                    )
                self.header = ShardHeader(**fields)
                whole = (
                    self.header.digest(hashlib.file_digest(file, "sha256")) == self.header.sha256
                )
        except FileNotFoundError:
            raise UserError(
                f"the token shard {path} is missing; delete its folder to prepare it again"
            ) from None
        except (struct.error, ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            raise UserError(
                f"the token shard {path} is damaged or truncated; delete its folder to prepare it again"
            )

    def __getstate__(self) -> dict:
        return {"path": self.path, "header": self.header}  # a worker maps the file itself

    @cached_property
    def tokens(self) -> np.ndarray:
        """(tokens,)"""
        return np.memmap(self.path, self.header.dtype, "r", HEADER_BYTES, (self.header.tokens,))

    @cached_property
    def offsets(self) -> np.ndarray:
        """(documents,) where each document begins."""
        start = HEADER_BYTES + self.header.tokens * np.dtype(self.header.dtype).itemsize
        return np.memmap(self.path, "<i8", "r", start, (self.header.documents,))


@dataclass(frozen=True)
class EncodedBatch:
    """Tokens to append to a shard."""

    tokens: np.ndarray  # (n,)
    begins: np.ndarray  # indices into tokens at which documents begin
    bytes: int  # of their text


class ShardWriter:
    """Appends to `path`, which only `close` makes a shard.

    `state` and the same path go on where a killed process was, even one killed in `close`. Raises ValueError where less is
    on the disk than the state says.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, state: dict[str, int] | None = None):
        self.path, self.tokenizer, self.beside = path, tokenizer, path.with_suffix(".offsets")
        keys = ("tokens", "documents", "bytes")
        self.tokens, self.documents, self.bytes = (
            (0, 0, 0) if state is None else (state[key] for key in keys)
        )
        begin = HEADER_BYTES + self.tokens * np.dtype(tokenizer.dtype).itemsize
        with ExitStack() as opened:
            self.file = opened.enter_context(self._open(path, begin, goes_on=state is not None))
            self.offsets = opened.enter_context(
                self._open(self.beside, self.documents * 8, goes_on=state is not None)
            )
            self.opened = opened.pop_all()

    @staticmethod
    def _open(path: Path, size: int, goes_on: bool) -> BinaryIO:
        """The file at exactly `size` bytes, to be appended to."""
        if goes_on and path.stat().st_size < size:
            raise ValueError(f"{path} has lost its end")
        file = path.open("r+b" if goes_on else "w+b")
        file.truncate(size)  # what was written after the state was taken
        file.seek(size)
        return file

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()

    def write(self, encoded: EncodedBatch) -> None:
        self.file.write(encoded.tokens.astype(self.tokenizer.dtype, copy=False).data)
        self.offsets.write((encoded.begins + self.tokens).astype("<i8").data)
        self.tokens += len(encoded.tokens)
        self.documents += len(encoded.begins)
        self.bytes += encoded.bytes

    def state(self) -> dict[str, int]:
        """What has been written, once it is on the disk."""
        for file in (self.file, self.offsets):
            file.flush()
            os.fsync(file.fileno())
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}

    def close(self) -> None:
        """Add the last eos, the offsets and the header. The file `beside` stays: without it nothing could go on."""
        self.write(
            EncodedBatch(
                np.array(self.tokenizer.final, self.tokenizer.dtype), np.empty(0, np.int64), 0
            )
        )
        self.offsets.seek(0)
        shutil.copyfileobj(self.offsets, self.file)
        self.file.seek(HEADER_BYTES)
        header = ShardHeader(
            self.tokenizer.dtype,
            self.tokens,
            self.documents,
            self.bytes,
            "",
            self.tokenizer.fingerprint,
        )
        header = replace(header, sha256=header.digest(hashlib.file_digest(self.file, "sha256")))
        text = json.dumps(asdict(header)).encode()
        self.file.seek(0)
        self.file.write((MAGIC + struct.pack("<I", len(text)) + text).ljust(HEADER_BYTES, b"\0"))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.opened.close()
