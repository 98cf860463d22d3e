"""Token shards: the files that training reads.

A shard is MAGIC, a header, the tokens, and for each document the index of its first token:

    "TOKSHARD"  length of the header (uint32)  header (JSON)  zeros up to byte 1024
    tokens (uint16, or uint32 for a vocabulary above 65,536)
    document offsets (int64)

A document starts with the token before its text: bos, or the eos of the document before it.
"""

import hashlib
import json
import os
import shutil
import struct
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer

MAGIC = b"TOKSHARD"
HEADER_BYTES = 1024
DTYPES = ("<u2", "<u4")


@dataclass(frozen=True)
class ShardHeader:
    """The header of a shard."""

    dtype: str  # "<u2", or "<u4" for a vocabulary above 65,536
    tokens: int
    documents: int
    bytes: int  # UTF-8 bytes of the documents' text, without what the tokenizer leaves out
    sha256: str  # of the tokens, the document offsets, and the other fields
    tokenizer: str  # fingerprint
    version: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for a value that no writer has written."""
        counts = (self.tokens, self.documents, self.bytes)
        texts = (self.sha256, self.tokenizer)
        if (
            self.dtype not in DTYPES
            or not all(type(count) is int and count >= 0 for count in counts)
            or not all(isinstance(text, str) for text in texts)
        ):
            raise ValueError("not a header of a token shard")

    @property
    def file_size(self) -> int:
        """Bytes of the whole shard."""
        itemsize = np.dtype(self.dtype).itemsize
        return HEADER_BYTES + self.tokens * itemsize + self.documents * 8

    def digest(self, content: Any) -> str:
        """Return `sha256`, given a hash object that has read the tokens and offsets."""
        content.update(json.dumps(asdict(self) | {"sha256": ""}).encode())
        return str(content.hexdigest())


class JoinedArray:
    """One-dimensional arrays laid end to end without a copy, read by slices or arrays of indices.

    >>> joined = JoinedArray([np.arange(3), np.arange(10, 12)])
    >>> joined[1:4].tolist(), joined[np.array([[0, 4]])].tolist(), len(joined)
    ([1, 2, 10], [[0, 11]], 5)
    """

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays, self.dtype = arrays, arrays[0].dtype
        self.starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            first, end, step = index.indices(len(self))
            assert step == 1
            slices = [
                array[max(0, first - start) : max(0, end - start)]
                for array, start in zip(self.arrays, self.starts.tolist(), strict=False)
                if start < end and first < start + len(array)
            ]
            return np.concatenate(slices or [self.arrays[0][:0]])
        found = np.empty(index.shape, self.dtype)
        owners = np.searchsorted(self.starts, index, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            found[mine] = self.arrays[owner][index[mine] - self.starts[owner]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


Tokens = np.ndarray | JoinedArray


class TokenShard:
    """A shard, memory-mapped.

    Raises UserError with the path if the file is missing, foreign, truncated or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self.header = self._read_header(file.read(HEADER_BYTES))
                intact = os.fstat(file.fileno()).st_size == self.header.file_size
                if intact:
                    digest = self.header.digest(hashlib.file_digest(file, "sha256"))
                    intact = digest == self.header.sha256 and self._has_ordered_offsets()
        except FileNotFoundError:
            raise UserError(
                f"the token shard {path} is missing; delete its folder to prepare it again"
            ) from None
        except (struct.error, ValueError, TypeError, KeyError, RecursionError):
            intact = False
        if not intact:
            raise UserError(
                f"the token shard {path} is damaged or truncated; "
                "delete its folder to prepare it again"
            )

    def _read_header(self, raw: bytes) -> ShardHeader:
        if raw[:8] != MAGIC:
            raise UserError(f"{self.path} is not a token shard; delete it to prepare it again")
        (length,) = struct.unpack("<I", raw[8:12])
        fields = json.loads(raw[12 : 12 + length])
        if fields["version"] != ShardHeader.version:
            raise UserError(
                f"{self.path} is a token shard of version {fields['version']}; "
                f"this program reads {ShardHeader.version}"
            )
        return ShardHeader(**fields)

    def _has_ordered_offsets(self) -> bool:
        """Return whether each document begins within the tokens, and none before the last one."""
        offsets = self.offsets
        if not len(offsets):
            return True
        in_range = offsets[0] >= 0 and offsets[-1] <= self.header.tokens
        return bool(in_range and (offsets[:-1] <= offsets[1:]).all())

    def __getstate__(self) -> dict[str, Any]:
        # Without the maps: a worker process maps the file itself.
        return {"path": self.path, "header": self.header}

    @cached_property
    def tokens(self) -> Tokens:
        """Token ids (tokens,)."""
        return np.memmap(self.path, self.header.dtype, "r", HEADER_BYTES, (self.header.tokens,))

    @cached_property
    def offsets(self) -> np.ndarray:
        """Index of the first token of each document (documents,)."""
        start = HEADER_BYTES + self.header.tokens * np.dtype(self.header.dtype).itemsize
        return np.memmap(self.path, "<i8", "r", start, (self.header.documents,))

    def row_lengths(self, ends_shared: bool) -> np.ndarray:
        """Return the number of tokens of each document in a row of its own (documents,).

        `ends_shared`: the first token of a document also ends the one before it.
        """
        offsets = self.offsets
        ends = np.append(offsets[1:] + ends_shared, self.header.tokens)
        return np.asarray(ends - offsets)


@dataclass(frozen=True)
class EncodedBatch:
    """Tokens to append to a shard."""

    tokens: np.ndarray  # (n,)
    document_starts: np.ndarray  # indices into tokens, one for each document that starts here
    bytes: int  # UTF-8 bytes of the text that they stand for
    left_out: Counter[str] = field(default_factory=Counter)  # characters without a token


class ShardWriter:
    """Appends tokens to `path`, which becomes a valid shard in `close`.

    A writer for the same path and an earlier `state` resumes where a killed process was, even if it
    was killed in `close`. Raises ValueError if the files hold less than the state says. Document
    offsets are kept in a file of their own until `close`.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, state: dict[str, Any] | None = None):
        self.path, self.tokenizer = path, tokenizer
        self.offsets_path = path.with_suffix(".offsets")
        self.tokens = self.documents = self.bytes = 0
        self.left_out: Counter[str] = Counter()
        if state is not None:
            self.tokens, self.documents = state["tokens"], state["documents"]
            self.bytes = state["bytes"]
            self.left_out.update(state.get("left_out", {}))
        size = HEADER_BYTES + self.tokens * np.dtype(tokenizer.dtype).itemsize
        resume = state is not None
        with ExitStack() as opened:
            self.file = opened.enter_context(self._open(path, size, resume))
            self.offsets = opened.enter_context(
                self._open(self.offsets_path, self.documents * 8, resume)
            )
            self._opened = opened.pop_all()

    @staticmethod
    def _open(path: Path, size: int, resume: bool) -> BufferedRandom:
        """Open the file for appending at exactly `size` bytes."""
        if resume and path.stat().st_size < size:
            raise ValueError(f"{path} has lost its end")
        file = path.open("r+b") if resume else path.open("w+b")
        file.truncate(size)  # removes what was written after the state was taken
        file.seek(size)
        return file

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def write(self, batch: EncodedBatch) -> None:
        """Append the tokens of a batch."""
        self.file.write(batch.tokens.astype(self.tokenizer.dtype, copy=False).data)
        self.offsets.write((batch.document_starts + self.tokens).astype("<i8").data)
        self.tokens += len(batch.tokens)
        self.documents += len(batch.document_starts)
        self.bytes += batch.bytes
        self.left_out += batch.left_out

    def state(self) -> dict[str, Any]:
        """Flush everything to the disk, and return how much has been written."""
        for file in (self.file, self.offsets):
            file.flush()
            os.fsync(file.fileno())
        state = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        return state | ({"left_out": self.left_out} if self.left_out else {})

    def close(self, ends_corpus: bool = True) -> None:
        """Write the last eos, if the corpus ends here, the document offsets and the header.

        The file of offsets is kept, because a resumed writer needs it.
        """
        if ends_corpus:
            final = np.array(self.tokenizer.corpus_suffix, self.tokenizer.dtype)
            self.write(EncodedBatch(final, np.empty(0, np.int64), 0))
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
        self._opened.close()
