"""Helpers of the tests of sources: small pieces, compressed files, and the documents of a path."""

import gzip
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from pocketlm.config.sections import SourceConfig
from pocketlm.corpus import pieces, readers
from pocketlm.corpus.pieces import Source
from pocketlm.corpus.sources import open_source
from pocketlm.errors import UserError


@contextmanager
def small_pieces(size: int, rows: int | None = None) -> Iterator[None]:
    """Read pieces and blocks of `size`, and as many rows, so that short texts have many borders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARACTERS", size)
        patch.setattr(readers, "BLOCK_BYTES", size)
        patch.setattr(readers, "TABLE_ROWS", rows or size)
        yield


def documents_of(source: Source) -> list[str]:
    """Return the documents of a source; check that only the last piece of each may be short."""
    documents, pending = [], []
    for text, is_last in source.pieces():
        assert 0 < len(text) <= pieces.PIECE_CHARACTERS
        assert is_last or len(text) == pieces.PIECE_CHARACTERS
        pending.append(text)
        if is_last:
            documents.append("".join(pending))
            pending = []
    assert pending == []
    return documents


def open_path(path: Path | str, **keys: object) -> Source:
    """Open the source of a config with this path and other keys."""
    return open_source(SourceConfig(path=str(path), **keys), "no data folder is needed")


def read_path(path: Path | str, **keys: object) -> list[str]:
    """Return the documents of a path."""
    return documents_of(open_path(path, **keys))


def not_blank(texts: list[str | None]) -> list[str]:
    """Return the texts that are not white space only."""
    return [text for text in texts if text and text.strip()]


def refusal(path: Path | str, **keys: object) -> str:
    """Return the message of the error when a path is read. It is one line."""
    with pytest.raises(UserError) as error:
        read_path(path, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def compress_zstd(raw: bytes) -> bytes:
    """Return the bytes as one Zstandard frame."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": compress_zstd}
SUFFIXES = list(COMPRESS)


def write_file(folder: Path, name: str, raw: bytes, cuts: tuple[int, ...] = ()) -> Path:
    """Write bytes, compressed as the name says, in several members or frames divided at `cuts`."""
    path = folder / name
    compress = COMPRESS.get(path.suffix.lower(), bytes)
    borders = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    path.write_bytes(b"".join(compress(raw[a:b]) for a, b in itertools.pairwise(borders)))
    return path
