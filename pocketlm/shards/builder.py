"""Shard builder: the documents of one source, tokenised on all cores into a folder of token shards.

    chunks -> batches -> Tokenizer, on a pool of threads -> ShardWriter -> shards/<key>/train.bin

The key is a hash of the documents, the validation share and the tokenizer. The shards are written
in a folder `unfinished-<key>`, which is renamed when they are complete. Every few seconds a journal
in that folder records how many batches are on the disk, so that a killed preparation resumes there.

A part of a source is built in the same way, in a folder of its own; parts.py joins them.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from pocketlm.corpus.chunks import (
    SPLITS,
    Chunk,
    Split,
    at_token_boundaries,
    batch_chunks,
    chunks_of_part,
    split_source,
)
from pocketlm.corpus.input_files import kind_of
from pocketlm.corpus.pieces import WHOLE, Part, Source
from pocketlm.corpus.readers import FileSource
from pocketlm.errors import UserError
from pocketlm.files import sync_folder
from pocketlm.shards.bin_files import encode_tokens, token_batches
from pocketlm.shards.format import EncodedBatch, ShardWriter, TokenShard
from pocketlm.shards.joined import open_shard
from pocketlm.shards.parts import PartSet, complete_set
from pocketlm.shards.progress import TokenisingProgress
from pocketlm.tokenizer.base import Tokenizer

T = TypeVar("T")

BUILD_VERSION = 2
"""Part of the key of every folder of shards. Raise it when other files are written than before, so
that the old folders are not found any more."""

EncodedSplits = dict[Split, EncodedBatch]


def encode_chunks(chunks: list[Chunk], tokenizer: Tokenizer) -> EncodedSplits:
    """Return the chunks as tokens, for each split that has any of them."""
    rows = tokenizer.encode_arrays([chunk.text for chunk in chunks])
    encoded: EncodedSplits = {}
    for split in SPLITS:
        mine = [pair for pair in zip(chunks, rows, strict=True) if pair[0].split == split]
        if mine:
            encoded[split] = join_encoded(mine, tokenizer)
    return encoded


def join_encoded(encoded: Iterable[tuple[Chunk, np.ndarray]], tokenizer: Tokenizer) -> EncodedBatch:
    """Join the ids of chunks, with the special tokens where documents start and end."""
    prefix = np.array(tokenizer.document_prefix, tokenizer.dtype)
    suffix = np.array(tokenizer.document_suffix, tokenizer.dtype)
    arrays: list[np.ndarray] = []
    starts: list[int] = []
    left_out: Counter[str] = Counter()
    length = size = 0
    for chunk, ids in encoded:
        if chunk.starts_document:
            starts.append(length)
            arrays.append(prefix)
            length += len(prefix)
        arrays.append(ids)
        length += len(ids)
        if chunk.ends_document:
            arrays.append(suffix)
            length += len(suffix)
        size += len(chunk.text.encode())
        left_out += tokenizer.left_out_characters(chunk.text, ids)
    size -= bytes_of(left_out)
    return EncodedBatch(np.concatenate(arrays), np.array(starts, np.int64), size, left_out)


def bytes_of(characters: Counter[str]) -> int:
    """Return the UTF-8 bytes of counted characters."""
    return sum(len(character.encode()) * count for character, count in characters.items())


@dataclass(frozen=True)
class SourceAccount:
    """Bytes of a source for which no token of a shard stands, by the reason."""

    name: str
    bytes: int
    left_out: dict[str, int]  # bytes by the reason
    characters: dict[str, int]  # those for which the tokenizer has no token, counted


WHITE_SPACE = "white space that the tokenizer leaves out"
NO_ENTRY = "characters that the tokenizer has no entry for"


@dataclass(frozen=True)
class BuildSettings:
    """Options of building shards. None of them changes the tokens."""

    batch_size: int = 2**20  # characters that a thread tokenises at a time, or ids of a token file
    journal_seconds: float = 2.0  # between two entries of the journal
    threads: int | None = None  # None: one more than cores, since Python's lock makes each wait
    encode: Callable[[list[Chunk], Tokenizer], EncodedSplits] = encode_chunks


class ShardBuilder:
    """Builds the shards of one source in a folder, which appears only once it is complete.

    A `val_share` of 0 makes a shard for training only, of 1 one for validation only. Raises
    UserError if parts of the source have been prepared that cannot be joined.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        val_share: float,
        shards: Path,
        settings: BuildSettings,
        part: Part = WHOLE,
    ):
        self.source, self.tokenizer, self.val_share = source, tokenizer, val_share
        self.settings = settings
        self.digest = source.digest()
        key = [BUILD_VERSION, self.digest, val_share, tokenizer.fingerprint]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.whole, self.part = shards / name, part if source.divisible else WHOLE
        self.parts = PartSet(shards / f"parts-{name}-of-{part.count}", part.count)
        if self.part != WHOLE:
            shards, name = self.parts.folder, str(part.index + 1)
        self.folder, self.unfinished = shards / name, shards / f"unfinished-{name}"
        self.journal = self.unfinished / "journal.json"
        self.splits: tuple[Split, ...] = SPLITS
        if val_share == 0:
            self.splits = ("train",)
        elif val_share == 1:
            self.splits = ("val",)

    def run(self) -> dict[Split, TokenShard]:
        """Return the shards, building them if their folder does not exist."""
        if self.whole.is_dir():
            self.folder = self.whole
        if not self.folder.is_dir():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with hold_lock(FileLock(self.folder.with_suffix(".lock"))):
                if not self.folder.is_dir():  # another process may have built it meanwhile
                    self._build()
        shards = {split: open_shard(self.folder, split) for split in self.splits}
        for shard in shards.values():
            if shard.header.tokenizer != self.tokenizer.fingerprint:
                raise UserError(
                    f"the token shard {shard.path} was made with another tokenizer; "
                    "delete its folder to prepare it again"
                )
        return shards

    def account(self) -> SourceAccount:
        """Return where the bytes of the source went, after `run`."""
        path = self.folder / "account.json"
        try:
            entry = json.loads(path.read_text())
            return SourceAccount(
                self.source.name, entry["bytes"], entry["left_out"], entry["characters"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} is missing or damaged; delete its folder to prepare it again"
            ) from None

    def _build(self) -> None:
        if self.part != WHOLE:
            self.parts.write_settings(self._key_in_words())
        elif parts := complete_set(self.folder.parent, self.folder.name, self._key_in_words()):
            self._join(parts)
            return
        try:
            self.unfinished.mkdir(exist_ok=True)
            self._write()
            os.replace(self.unfinished, self.folder)
        except UserError:  # the text is wrong, so that there is nothing to resume
            shutil.rmtree(self.unfinished)
            raise
        except OSError as error:
            folder = self.folder.parent
            free = shutil.disk_usage(folder).free / 1e6
            raise UserError(
                f"cannot write token shards to {folder}: {error.strerror or error}, with "
                f"{free:,.0f} MB free; make room, or set data.cache_dir, and run the same command "
                "again"
            ) from error

    def _key_in_words(self) -> dict[str, Any]:
        """Return what decides the key, to tell what differs between two of them."""
        config = getattr(self.source, "config", None)
        names = ("separator", "text_field", "errors", "config_name", "split", "revision")
        reading = {f"data.{name}": getattr(config, name) for name in names} if config else {}
        return {
            "source": self.source.name,
            "version": BUILD_VERSION,
            "data.val_share": self.val_share,
            "data.tokenizer": self.tokenizer.name,
            "fingerprint": self.tokenizer.fingerprint,
            **reading,
            "digest": self.digest,
        }

    def _join(self, parts: PartSet) -> None:
        headers = parts.join(self.splits)
        account = json.loads((parts.folder / "account.json").read_text())
        documents = sum(header.documents for header in headers.values())
        for split, header in headers.items():
            if not header.bytes:
                left_out = Counter(account["characters"] if header.documents else {})
                raise self._empty_split_error(split, documents, left_out)
        os.replace(parts.folder, self.folder)
        sync_folder(self.folder.parent)

    def _write(self) -> None:
        """Write all of the source, starting where the journal says."""
        with ExitStack() as opened:
            done, writers = self._open_writers(opened)
            journal_time = time.monotonic()
            with TokenisingProgress(self.source, done, self.part) as progress:
                for number, encoded in enumerate(self._encoded_batches(done), done + 1):
                    for split, batch in encoded.items():
                        writers[split].write(batch)
                        progress.advance(batch.bytes, len(batch.tokens))
                    if time.monotonic() - journal_time > self.settings.journal_seconds:
                        self._write_journal(number, writers)
                        journal_time = time.monotonic()
            self._write_account(writers.values())
            documents = sum(writer.documents for writer in writers.values())
            for split, writer in writers.items():
                if not writer.bytes and self.part == WHOLE:
                    raise self._empty_split_error(split, documents, writer.left_out)
            for writer in writers.values():
                writer.close(ends_corpus=self.part.index == self.part.count - 1)
        # The journal first: without the offset files it cannot be used.
        self.journal.unlink(missing_ok=True)
        for writer in writers.values():
            writer.offsets_path.unlink()

    def _write_account(self, writers: Iterable[ShardWriter]) -> None:
        characters: Counter[str] = Counter()
        size = 0
        for writer in writers:
            characters += writer.left_out
            size += writer.bytes
        spaces = Counter({one: count for one, count in characters.items() if one.isspace()})
        left_out = {WHITE_SPACE: bytes_of(spaces), NO_ENTRY: bytes_of(characters - spaces)}
        size += sum(left_out.values())
        if not holds_tokens(self.source):
            size = self.source.account.bytes
            left_out |= self.source.account.left_out
        left_out = {reason: count for reason, count in left_out.items() if count}
        entry = {"bytes": size, "left_out": left_out, "characters": characters}
        (self.unfinished / "account.json").write_text(json.dumps(entry))

    def _write_journal(self, batches: int, writers: dict[Split, ShardWriter]) -> None:
        states = {split: writer.state() for split, writer in writers.items()}
        entry = {"batches": batches, "size": self.settings.batch_size, "parts": states}
        new = self.journal.with_suffix(".new")
        new.write_text(json.dumps(entry))
        os.replace(new, self.journal)

    def _open_writers(self, opened: ExitStack) -> tuple[int, dict[Split, ShardWriter]]:
        """Return how many batches are on the disk already, and a writer for each split."""
        try:
            entry = json.loads(self.journal.read_text())
            if entry["size"] == self.settings.batch_size:
                return entry["batches"], self._writers_from(entry["parts"], opened)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there is no journal, or it does not match the files: start again
        self.journal.unlink(missing_ok=True)
        return 0, self._writers_from(dict.fromkeys(self.splits), opened)

    def _writers_from(
        self, states: dict[Split, dict[str, int] | None], opened: ExitStack
    ) -> dict[Split, ShardWriter]:
        writers = {}
        for split in self.splits:
            path = self.unfinished / f"{split}.bin"
            writer = ShardWriter(path, self.tokenizer, states[split])
            writers[split] = opened.enter_context(writer)
        return writers

    def _empty_split_error(self, split: Split, documents: int, left_out: Counter[str]) -> UserError:
        if not documents:
            return UserError(f"{self.source.name} holds no text")
        if left_out:
            return UserError(
                f"the tokenizer {self.tokenizer.name!r} has no entry for any character of the "
                f"{split} part of {self.source.name}: {most_common(left_out)}; "
                "use another tokenizer, such as gpt2, byte or char"
            )
        return UserError(
            f"data.val_share {self.val_share} leaves nothing for the {split} part of "
            f"{self.source.name} (documents: {documents}); change it, or give more text"
        )

    def _encoded_batches(self, skip: int) -> Iterator[EncodedSplits]:
        """Yield the batches after the first `skip`, in order, tokenised on all cores."""
        self.tokenizer.encode_arrays([""])  # fills its caches once, not in each thread
        threads = self.settings.threads or (os.cpu_count() or 1) + 1
        pending: deque[AsyncResult[EncodedSplits]] = deque()
        with ThreadPool(threads) as pool:  # of daemons: Ctrl-C does not wait for a batch
            for job in islice(self._jobs(), skip, None):
                pending.append(pool.apply_async(job))
                if len(pending) > 2 * threads:  # bounds how far reading is ahead
                    yield pending.popleft().get()
            while pending:
                yield pending.popleft().get()

    def _jobs(self) -> Iterator[Callable[[], EncodedSplits]]:
        """Yield a function for each batch that tokenises it."""
        size, tokenizer = self.settings.batch_size, self.tokenizer
        if isinstance(self.source, FileSource) and holds_tokens(self.source):
            for ids in token_batches(self.source.files, tokenizer, self.val_share, size):
                yield partial(encode_tokens, ids, tokenizer)
        else:
            chunks = split_source(self.source, self.val_share, self.part)
            chunks = at_token_boundaries(chunks, tokenizer)
            if self.part != WHOLE:
                chunks = chunks_of_part(chunks, self.source, self.part)
            for batch in batch_chunks(chunks, size):
                yield partial(self.settings.encode, batch, tokenizer)


def holds_tokens(source: Source) -> bool:
    """Return whether a source is token files, not text."""
    return isinstance(source, FileSource) and kind_of(source.files[0]) == "tokens"


def most_common(characters: Counter[str]) -> str:
    """Return the most frequent characters in words.

    >>> most_common(Counter({"a": 1200, "b": 7}))
    "'a' 1,200 times, 'b' 7 times"
    """
    listed = ", ".join(f"{one!r} {count:,} times" for one, count in characters.most_common(5))
    return f"{listed}, ..." if len(characters) > 5 else listed


def call_in_daemon(function: Callable[[], T]) -> T:
    """Return `function()`, called in a daemon thread.

    So Ctrl-C ends the program at once, even while the function is in a library that does not look
    at signals.
    """
    with ThreadPool(1) as pool:
        return pool.apply_async(function).get()


@contextmanager
def hold_lock(lock: FileLock) -> Iterator[None]:
    """Hold the lock; print a line if another process has to release it first."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("another process is preparing the same data; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
