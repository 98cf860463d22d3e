"""Joined shards: the parts of a corpus, which several processes have prepared, as one shard.

A manifest, `train.json`, has the header of the shard that one process would have written, with the
same SHA-256, and names the parts, each a shard in a file of its own. `train.offsets` has the
document offsets of the whole. Nothing is copied: the tokens stay where they were written.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.corpus.chunks import Split
from pocketlm.corpus.pieces import sha256_of_file
from pocketlm.errors import UserError
from pocketlm.files import atomic_write
from pocketlm.shards.format import JoinedArray, ShardHeader, Tokens, TokenShard

BLOCK = 2**22  # tokens, or offsets, that are read at a time


class JoinedShard(TokenShard):
    """A shard of several files, memory-mapped, given the path of its manifest.

    Raises UserError, naming the file, if one of them is missing, foreign, truncated or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            entry = json.loads(path.read_text())
            files = [path.parent / part["file"] for part in entry["parts"]]
            digests = [part["sha256"] for part in entry["parts"]]
            intact = entry["checksum"] == checksum(entry)
            self.header = ShardHeader(**entry["header"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise damaged(path) from None
        if not intact or not self.offsets_path.is_file():
            raise damaged(path if not intact else self.offsets_path)
        with ThreadPoolExecutor() as pool:  # hashing releases Python's global lock
            self.parts = list(pool.map(TokenShard, files))
        for part, digest in zip(self.parts, digests, strict=True):
            if part.header.sha256 != digest:
                raise damaged(part.path)
        if sha256_of_file(self.offsets_path) != entry["offsets"]:
            raise damaged(self.offsets_path)

    @property
    def offsets_path(self) -> Path:
        return self.path.with_suffix(".offsets")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "header": self.header, "parts": self.parts}

    @cached_property
    def tokens(self) -> Tokens:
        """Token ids (tokens,)."""
        return JoinedArray([np.asarray(part.tokens) for part in self.parts])

    @cached_property
    def offsets(self) -> np.ndarray:
        """Index of the first token of each document (documents,)."""
        return np.memmap(self.offsets_path, "<i8", "r", 0, (self.header.documents,))


def open_shard(folder: Path, split: Split) -> TokenShard:
    """Return the shard of a split in a folder, of one file or joined."""
    manifest = folder / f"{split}.json"
    return JoinedShard(manifest) if manifest.exists() else TokenShard(folder / f"{split}.bin")


def join_shards(path: Path, parts: list[TokenShard]) -> ShardHeader:
    """Write the manifest `path` of a shard, and its offsets; return the header.

    The digest is that of a shard of a single file with the same content.
    """
    content, base = hashlib.sha256(), 0
    for part in parts:
        for start in range(0, part.header.tokens, BLOCK):
            content.update(np.asarray(part.tokens[start : start + BLOCK]).data)
    offsets_path = path.with_suffix(".offsets")
    with atomic_write(offsets_path) as unfinished, unfinished.open("wb") as file:
        for part in parts:
            for start in range(0, part.header.documents, BLOCK):
                offsets = (part.offsets[start : start + BLOCK] + base).astype("<i8")
                content.update(offsets.data)
                file.write(offsets.data)
            base += part.header.tokens
    first = parts[0].header
    header = replace(
        first,
        tokens=base,
        documents=sum(part.header.documents for part in parts),
        bytes=sum(part.header.bytes for part in parts),
        sha256="",
    )
    header = replace(header, sha256=header.digest(content))
    names = [os.path.relpath(part.path, path.parent) for part in parts]
    entry: dict[str, Any] = {
        "header": asdict(header),
        "parts": [
            {"file": Path(name).as_posix(), "sha256": part.header.sha256}
            for name, part in zip(names, parts, strict=True)
        ],
        "offsets": sha256_of_file(offsets_path),
    }
    entry["checksum"] = checksum(entry)
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(entry, indent=1))
    return header


def checksum(entry: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest."""
    rest = {key: value for key, value in entry.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def damaged(path: Path) -> UserError:
    """Return the error for a file of a joined shard that is missing or damaged."""
    return UserError(
        f"the token shard {path} is missing or damaged; delete its folder to prepare it again"
    )
