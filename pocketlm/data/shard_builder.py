"""One source into a folder of token shards."""

import hashlib
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from pocketlm.corpus.chunks import Chunk, at_token_boundaries, batch_chunks, split_source
from pocketlm.corpus.pieces import Source
from pocketlm.corpus.readers import FileSource, kind_of
from pocketlm.data.bin_files import encode_tokens, token_batches
from pocketlm.data.shards import EncodedBatch, ShardHeader, ShardWriter, TokenShard
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer

BATCH = (
    2**20
)  # characters that one thread tokenises at a time; a token file is copied in as many ids
JOURNAL_SECONDS = 2.0


# ---- batches -> shards -----------------------------------------------------------------------------------------------


def encode(batch: list[Chunk], tokenizer: Tokenizer) -> dict[bool, EncodedBatch]:
    """The batch's documents as tokens, for train (False) and for validation (True), where there are any."""
    rows = tokenizer.encode_arrays([chunk.text for chunk in batch])
    prefix, closing, nothing = (
        np.array(ids, tokenizer.dtype) for ids in (tokenizer.prefix, tokenizer.closing, [])
    )
    parts = {}
    for validation in {chunk.validation for chunk in batch}:
        arrays, begins, length, size = [], [], 0, 0
        for chunk, row in zip(batch, rows, strict=True):
            if chunk.validation == validation:
                if chunk.begins:
                    begins.append(length)
                around = (
                    prefix if chunk.begins else nothing,
                    row,
                    closing if chunk.ends else nothing,
                )
                arrays += around
                length += sum(map(len, around))
                size += len(chunk.text.encode())
        parts[validation] = EncodedBatch(np.concatenate(arrays), np.array(begins, np.int64), size)
    return parts


class Preparation:
    """One source into one folder of shards, which appears whole or not at all."""

    def __init__(self, source: Source, tokenizer: Tokenizer, share: float, shards: Path):
        self.source, self.tokenizer, self.share = source, tokenizer, share
        key = [ShardHeader.version, source.digest(), share, tokenizer.fingerprint]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.folder, self.unfinished = shards / name, shards / f"unfinished-{name}"
        self.journal = self.unfinished / "journal.json"
        self.parts = (
            {False: "train"}
            if share == 0
            else {True: "val"}
            if share == 1
            else {False: "train", True: "val"}
        )

    def run(self) -> dict[bool, TokenShard]:
        """The shards: those that are there, or new ones."""
        if not self.folder.is_dir():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with waited_for(FileLock(self.folder.with_suffix(".lock"))):
                if not self.folder.is_dir():  # another process may have made it meanwhile
                    self.make()
        shards = {
            validation: TokenShard(self.folder / f"{name}.bin")
            for validation, name in self.parts.items()
        }
        for shard in shards.values():
            if shard.header.tokenizer != self.tokenizer.fingerprint:
                raise UserError(
                    f"the token shard {shard.path} was made with another tokenizer; delete its folder to prepare it again"
                )
        return shards

    def make(self) -> None:
        """Write the shards beside their place, and move them there."""
        try:
            self.unfinished.mkdir(exist_ok=True)
            self.write()
            os.replace(self.unfinished, self.folder)
        except UserError:  # of which nothing is to be kept; a killed preparation goes on
            shutil.rmtree(self.unfinished)
            raise
        except OSError as error:
            free = shutil.disk_usage(self.folder.parent).free / 1e6
            raise UserError(
                f"cannot write token shards to {self.folder.parent}: {error.strerror or error}, with {free:,.0f} MB free; "
                "make room, or set data.cache_dir, and run the same command again"
            ) from error

    def write(self) -> None:
        """All of the source, from where an earlier preparation was killed."""
        with ExitStack() as opened:
            done, writers = self.writers(opened)
            saved = time.monotonic()
            with progress(self.source, done) as advance:
                for number, encoded in enumerate(self.encoded(done), done + 1):
                    for validation, part in encoded.items():
                        writers[validation].write(part)
                        advance(part.bytes, len(part.tokens))
                    if time.monotonic() - saved > JOURNAL_SECONDS:
                        states = {
                            self.parts[validation]: writer.state()
                            for validation, writer in writers.items()
                        }
                        new = self.journal.with_suffix(".new")
                        new.write_text(
                            json.dumps({"batches": number, "size": BATCH, "parts": states})
                        )
                        os.replace(new, self.journal)
                        saved = time.monotonic()
            for validation, writer in writers.items():
                if not writer.bytes:
                    raise self.empty(
                        self.parts[validation], sum(writer.documents for writer in writers.values())
                    )
            for writer in writers.values():
                writer.close()
        self.journal.unlink(missing_ok=True)  # first, since it is of no use without the others
        for writer in writers.values():
            writer.beside.unlink()

    def writers(self, opened: ExitStack) -> tuple[int, dict[bool, ShardWriter]]:
        """A writer for each part, and how many batches they have had from a preparation that was killed."""

        def all_from(states: dict[str, dict[str, int] | None]) -> dict[bool, ShardWriter]:
            paths = {
                validation: self.unfinished / f"{name}.bin"
                for validation, name in self.parts.items()
            }
            return {
                v: opened.enter_context(ShardWriter(path, self.tokenizer, states[path.stem]))
                for v, path in paths.items()
            }

        try:
            read = json.loads(self.journal.read_text())
            if read["size"] == BATCH:
                return read["batches"], all_from(read["parts"])
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ):  # no journal, or one that does not go with the files
            pass
        self.journal.unlink(missing_ok=True)
        return 0, all_from(dict.fromkeys(self.parts.values()))

    def empty(self, name: str, documents: int) -> UserError:
        if not documents:
            return UserError(f"{self.source.name} holds no text")
        return UserError(
            f"data.val_share {self.share} leaves nothing for the {name} part of {self.source.name} (documents: {documents}); "
            "change it, or give more text"
        )

    def encoded(self, skip: int) -> Iterator[dict[bool, EncodedBatch]]:
        """The batches but the first `skip`, in order, tokenised by all cores."""
        if is_tokens(self.source):
            batches, function = (
                token_batches(self.source.files, self.tokenizer, self.share, BATCH),
                encode_tokens,
            )
        else:
            chunks = at_token_boundaries(split_source(self.source, self.share), self.tokenizer)
            batches, function = batch_chunks(chunks, BATCH), encode
        self.tokenizer.encode_arrays(
            [""]
        )  # what it makes for itself it makes once, not in each thread
        workers = (
            os.cpu_count() or 1
        ) + 1  # one more than cores: Python's lock makes each wait a little
        waiting: deque = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for batch in islice(batches, skip, None):
                    waiting.append(pool.submit(function, batch, self.tokenizer))
                    if len(waiting) > 2 * workers:  # what is read ahead must not grow
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)


def is_tokens(source: Source) -> bool:
    return isinstance(source, FileSource) and kind_of(source.files[0]) == "tokens"


@contextmanager
def waited_for(lock: FileLock) -> Iterator[None]:
    """Hold the lock; say so where another process has to end first."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("another process is preparing the same data; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def progress(source: Source, done: int) -> Iterator:
    """A function (bytes, tokens) that moves a bar on a terminal, and prints a line every 5 seconds elsewhere."""
    console = Console(stderr=True, highlight=False, emoji=False, markup=False)
    begin = last = time.monotonic()
    total = tokens = 0
    going_on = f"going on after {done} batches, " if done else ""

    def text() -> str:
        speed = total / 1e6 / max(time.monotonic() - begin, 1e-3)
        return f"{going_on}{total / 1e6:,.0f} MB, {tokens / 1e6:,.1f} M tokens, {speed:.1f} MB/s"

    said = (
        TextColumn("tokenising {task.description}", markup=False),
        TextColumn("{task.fields[text]}"),
    )
    columns = (SpinnerColumn(), said[0], BarColumn(24), said[1], TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(source.name, total=source.size, text="")

        def advance(more_bytes: int, more_tokens: int) -> None:
            nonlocal total, tokens, last
            total, tokens = total + more_bytes, tokens + more_tokens
            bar.update(task, completed=source.position if source.size else 0, text=text())
            if not console.is_terminal and time.monotonic() - last > 5:
                share = (
                    f"{source.position / source.size:.0%}, "
                    if source.size and source.position
                    else ""
                )
                console.print(f"tokenising {source.name}: {share}{text()}", soft_wrap=True)
                last = time.monotonic()

        yield advance
