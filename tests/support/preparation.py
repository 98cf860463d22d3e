"""Helpers of the tests of preparation: small corpora, small batches, and plain token lists."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from pocketlm.config.sections import DataConfig
from pocketlm.corpus import chunks, pieces, readers
from pocketlm.corpus.chunks import Chunk
from pocketlm.corpus.named import CORPORA
from pocketlm.data.prepare import PreparedData, PreparedSplit
from pocketlm.shards.builder import BuildSettings, EncodedSplits, encode_chunks
from pocketlm.shards.format import TokenShard
from pocketlm.tokenizer.base import Tokenizer

DATA = Path(__file__).parents[2] / "data"

ShardContent = tuple[list[int], list[int], int]  # tokens, document offsets, bytes of text


def write_jsonl(path: Path, documents: Iterable[str]) -> str:
    """Write one document per line, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def write_text(path: Path, text: str | bytes) -> str:
    """Write text or bytes, and return the path."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def byte_config(folder: Path, **changes: object) -> DataConfig:
    """Return a config with the byte tokenizer and a cache in `folder`."""
    return DataConfig(**{"tokenizer": "byte", "cache_dir": str(folder / "cache"), **changes})


def use_small_sizes(patch: pytest.MonkeyPatch, piece: int, batch: int) -> BuildSettings:
    """Patch the size of pieces, and return settings with small batches.

    So short texts have many pieces and batches.
    """
    patch.setattr(pieces, "PIECE_CHARACTERS", piece)
    patch.setattr(readers, "BLOCK_BYTES", piece)
    patch.setattr(chunks, "MAX_UNCUT_CHARACTERS", 4 * batch)
    return BuildSettings(batch_size=batch)


def only_shard(split: PreparedSplit) -> TokenShard:
    """Return the shard of a split that has one source."""
    (shard,) = split.shards
    return shard


def split_texts(data: PreparedData) -> list[str]:
    """Return all text of train, and all text of validation."""
    return [
        data.tokenizer.decode(only_shard(split).tokens.tolist()) for split in (data.train, data.val)
    ]


def shard_folders(cache: Path) -> list[Path]:
    """Return the folders of shards, finished or not."""
    return sorted(path for path in (cache / "shards").iterdir() if path.is_dir())


def shard_content(shard: TokenShard) -> ShardContent:
    """Return what a shard holds."""
    assert (shard.header.tokens, shard.header.documents) == (len(shard.tokens), len(shard.offsets))
    return shard.tokens.tolist(), shard.offsets.tolist(), shard.header.bytes


def expected_content(
    documents: list[str], encode: Callable[[str], Iterable[int]], bos: int | None, eos: int | None
) -> ShardContent:
    """Return what a shard of the documents should hold, by a plain loop."""
    tokens: list[int] = []
    starts = []
    for document in documents:
        starts.append(len(tokens))
        if bos is not None or eos is not None:
            tokens.append(eos if bos is None else bos)
        tokens.extend(encode(document))
        if bos is not None and eos is not None:
            tokens.append(eos)
    if bos is None and eos is not None:
        tokens.append(eos)
    return tokens, starts, sum(len(document.encode()) for document in documents)


class CountingEncoder:
    """The `encode` of BuildSettings that counts the batches, in `calls`."""

    def __init__(self) -> None:
        self._batches: list[int] = []  # appending is safe in several threads

    @property
    def calls(self) -> int:
        return len(self._batches)

    def __call__(self, batch: list[Chunk], tokenizer: Tokenizer) -> EncodedSplits:
        self._batches.append(len(batch))
        return encode_chunks(batch, tokenizer)


# ---- fixtures, for the conftest.py of a folder of tests ----


@pytest.fixture(scope="session")
def wiki() -> list[str]:
    """Return the documents of the corpus `wiki`."""
    return list(CORPORA["wiki"](str(DATA)))


@pytest.fixture
def small(monkeypatch) -> Callable[[int, int], BuildSettings]:
    """Return a function (piece, batch) that makes both small, and returns the settings."""
    return lambda piece, batch: use_small_sizes(monkeypatch, piece, batch)
