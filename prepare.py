"""From documents to token shards: split, fit a tokenizer, tokenise on all cores, keep the result under a key of its content.

    open_source -> pieces -> split -> batches -> Tokenizer on a pool of threads -> ShardWriter -> data/shards/<key>/

A preparation that was killed goes on: a journal beside the unfinished shards says how many batches are in them.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from config import DataConfig
from errors import UserError
from shards import Encoded, ShardHeader, ShardWriter, TokenShard, encode_tokens, token_batches
from sources import FileSource, Piece, Source, kind_of, open_source
from tokenizer import Tokenizer, build_tokenizer, from_state, is_trained

BATCH = 2**20  # characters that one thread tokenises at a time; a token file is copied in as many ids
JOURNAL_SECONDS = 2.0
HEAD_DOCUMENTS, HEAD_CHARACTERS = 10_000, 2**26  # what streaming looks at before it begins, whichever comes first


# ---- documents -> train and validation -------------------------------------------------------------------------------


def is_validation(document: str, share: float) -> bool:
    """Whether a hash of the text falls into the validation share: the same everywhere, and for equal texts."""
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True)
class Chunk:
    """A document, or a part of one."""

    validation: bool
    text: str
    begins: bool = True  # a document begins with it
    ends: bool = True


def lone_bytes(pieces: Iterable[Piece]) -> int | None:
    """UTF-8 bytes of the only document, or None where there are more, or none."""
    size, over = 0, False
    for text, ends in pieces:
        if over:
            return None
        size, over = size + len(text.encode()), ends
    return size or None


def split(pieces: Iterable[Piece], share: float, lone: int | None) -> Iterator[Chunk]:
    """Each document to train or validation by a hash of its (first) piece; a lone one of `lone` bytes gives its last share."""
    begins, validation = True, False
    border = 0 if lone is None else int(lone * (1 - share))  # in bytes of the lone document from here on
    for text, ends in pieces:
        if lone is None:
            validation = is_validation(text, share) if begins else validation
            yield Chunk(validation, text, begins, ends)
            begins = ends
        elif validation:
            yield Chunk(True, text, False, ends)
        elif not ends and border >= (size := len(text.encode())):
            yield Chunk(False, text, begins, False)
            begins, border = False, border - size
        else:
            raw = text.encode()
            while 0 < border < len(raw) and raw[border] & 0xC0 == 0x80:  # inside a character
                border -= 1
            if border or not begins:
                yield Chunk(False, raw[:border].decode(), begins, True)
            yield Chunk(True, raw[border:].decode(), True, ends)
            validation = True


def at_token_borders(chunks: Iterable[Chunk], tokenizer: Tokenizer) -> Iterator[Chunk]:
    """The same documents, in chunks that have the same ids apart as together."""
    held, begins = "", True
    for chunk in chunks:
        text = held + chunk.text
        if chunk.ends:
            yield Chunk(chunk.validation, text, begins, True)
            held, begins = "", True
            continue
        cut = tokenizer.cut(text)
        if not cut and len(text) >= 4 * BATCH:  # a word of megabytes is cut all the same
            cut = len(text)
        if cut:
            yield Chunk(chunk.validation, text[:cut], begins, False)
            begins = False
        held = text[cut:]


def in_batches(chunks: Iterable[Chunk], characters: int) -> Iterator[list[Chunk]]:
    """Lists of chunks of about as many characters."""
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk.text) + 1
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- batches -> shards -----------------------------------------------------------------------------------------------


def encode(batch: list[Chunk], tokenizer: Tokenizer) -> dict[bool, Encoded]:
    """The batch's documents as tokens, for train (False) and for validation (True), where there are any."""
    rows = tokenizer.encode_arrays([chunk.text for chunk in batch])
    prefix, closing, nothing = (np.array(ids, tokenizer.dtype) for ids in (tokenizer.prefix, tokenizer.closing, []))
    parts = {}
    for validation in {chunk.validation for chunk in batch}:
        arrays, begins, length, size = [], [], 0, 0
        for chunk, row in zip(batch, rows, strict=True):
            if chunk.validation == validation:
                if chunk.begins:
                    begins.append(length)
                around = (prefix if chunk.begins else nothing, row, closing if chunk.ends else nothing)
                arrays += around
                length += sum(map(len, around))
                size += len(chunk.text.encode())
        parts[validation] = Encoded(np.concatenate(arrays), np.array(begins, np.int64), size)
    return parts


class Preparation:
    """One source into one folder of shards, which appears whole or not at all."""

    def __init__(self, source: Source, tokenizer: Tokenizer, share: float, shards: Path):
        self.source, self.tokenizer, self.share = source, tokenizer, share
        key = [ShardHeader.version, source.digest(), share, tokenizer.fingerprint]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.folder, self.unfinished = shards / name, shards / f"unfinished-{name}"
        self.journal = self.unfinished / "journal.json"
        self.parts = {False: "train"} if share == 0 else {True: "val"} if share == 1 else {False: "train", True: "val"}

    def run(self) -> dict[bool, TokenShard]:
        """The shards: those that are there, or new ones."""
        if not self.folder.is_dir():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with waited_for(FileLock(self.folder.with_suffix(".lock"))):
                if not self.folder.is_dir():  # another process may have made it meanwhile
                    self.make()
        shards = {validation: TokenShard(self.folder / f"{name}.bin") for validation, name in self.parts.items()}
        for shard in shards.values():
            if shard.header.tokenizer != self.tokenizer.fingerprint:
                raise UserError(f"the token shard {shard.path} was made with another tokenizer; delete its folder to prepare it again")
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
                        states = {self.parts[validation]: writer.state() for validation, writer in writers.items()}
                        new = self.journal.with_suffix(".new")
                        new.write_text(json.dumps({"batches": number, "size": BATCH, "parts": states}))
                        os.replace(new, self.journal)
                        saved = time.monotonic()
            for validation, writer in writers.items():
                if not writer.bytes:
                    raise self.empty(self.parts[validation], sum(writer.documents for writer in writers.values()))
            for writer in writers.values():
                writer.close()
        self.journal.unlink(missing_ok=True)  # first, since it is of no use without the others
        for writer in writers.values():
            writer.beside.unlink()

    def writers(self, opened: ExitStack) -> tuple[int, dict[bool, ShardWriter]]:
        """A writer for each part, and how many batches they have had from a preparation that was killed."""

        def all_from(states: dict[str, dict[str, int] | None]) -> dict[bool, ShardWriter]:
            paths = {validation: self.unfinished / f"{name}.bin" for validation, name in self.parts.items()}
            return {v: opened.enter_context(ShardWriter(path, self.tokenizer, states[path.stem])) for v, path in paths.items()}

        try:
            read = json.loads(self.journal.read_text())
            if read["size"] == BATCH:
                return read["batches"], all_from(read["parts"])
        except (OSError, ValueError, KeyError, TypeError):  # no journal, or one that does not go with the files
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

    def encoded(self, skip: int) -> Iterator[dict[bool, Encoded]]:
        """The batches but the first `skip`, in order, tokenised by all cores."""
        if is_tokens(self.source):
            batches, function = token_batches(self.source.files, self.tokenizer, self.share, BATCH), encode_tokens
        else:
            chunks = at_token_borders(split_source(self.source, self.share), self.tokenizer)
            batches, function = in_batches(chunks, BATCH), encode
        self.tokenizer.encode_arrays([""])  # what it makes for itself it makes once, not in each thread
        workers = (os.cpu_count() or 1) + 1  # one more than cores: Python's lock makes each wait a little
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


def split_source(source: Source, share: float) -> Iterator[Chunk]:
    """The documents of a source, each on its side."""
    lone = lone_bytes(source.pieces()) if 0 < share < 1 else None
    return split(source.pieces(), share, lone)


def is_tokens(source: Source) -> bool:
    return isinstance(source, FileSource) and kind_of(source.files[0]) == "tokens"


class Head(Source):
    """The first documents of a source, two at least, read once."""

    def __init__(self, source: Source):
        self.source, self.name = source, f"the first documents of {source.name}"

    @cached_property
    def read(self) -> list[Piece]:
        read, documents, characters = [], 0, 0
        for text, ends in self.source.pieces():
            read.append((text, ends))
            documents, characters = documents + ends, characters + len(text)
            if ends and (documents >= HEAD_DOCUMENTS or documents > 1 and characters >= HEAD_CHARACTERS):
                break
        return read

    def pieces(self) -> Iterator[Piece]:
        return iter(self.read)


# ---- everything ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The shards to train on, one a source, or those to validate on."""

    shards: tuple[TokenShard, ...]

    @property
    def n_tokens(self) -> int:
        return sum(shard.header.tokens for shard in self.shards)

    @property
    def n_targets(self) -> int:
        """All tokens but the first of each shard."""
        return self.n_tokens - len(self.shards)

    @property
    def n_documents(self) -> int:
        return sum(shard.header.documents for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        return sum(shard.header.bytes for shard in self.shards)


@dataclass(frozen=True)
class PreparedData:
    """A corpus ready to train on. Where it is streamed, `train` is the first documents of `stream` only."""

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    tokenizer: Tokenizer
    train: Part
    val: Part
    stream: Source | None = None

    @property
    def name(self) -> str:
        return " + ".join(self.sources)

    @cached_property
    def sha256(self) -> str:
        """Of the tokens to train on."""
        digests = [shard.header.sha256 for shard in self.train.shards]
        return digests[0] if len(digests) == 1 else hashlib.sha256(json.dumps([digests, self.weights]).encode()).hexdigest()


def prepare(data: DataConfig) -> PreparedData:
    """Shards of the corpus under `data.cache_dir`, made unless the same text, split and tokenizer made them before."""
    shares, sources, val_sources = [], [], []
    for config in data.sources:
        sources.append(open_source(config, data.cache_dir, streaming=data.streaming))
        own = config.val_path or config.val_split
        shares.append(0.0 if own else data.val_share)
        val_sources.append(open_source(config, data.cache_dir, validation=True) if own else None)
    stream = None
    if data.streaming:
        stream = sources[0]
        if is_tokens(stream):
            raise UserError(f"{stream.name} is tokens already; set data.streaming to false")
        sources = [Head(stream)]
        if lone_bytes(stream.pieces()):
            raise UserError(f"data.streaming deals out documents, and {stream.name} is a single one; set data.separator")
    if is_trained(data.tokenizer) and (held := next((s.name for s in [*sources, *val_sources] if s and is_tokens(s)), None)):
        raise UserError(f"{held} holds tokens, from which no tokenizer {data.tokenizer!r} can be trained; name the one that made them")
    if data.tokenizer == "seen-bytes":  # which has no id for a byte that it has not seen
        if stream:
            raise UserError(f"data.streaming does not read {stream.name} beforehand, as the tokenizer seen-bytes has to; take byte")
        everything = [*sources, *filter(None, val_sources)]
        tokenizer = fitted_tokenizer(data, everything, [0.0] * len(everything))
    else:
        tokenizer = fitted_tokenizer(data, sources, shares)
    shards = Path(data.cache_dir) / "shards"
    train, val = [], []
    for source, share, val_source in zip(sources, shares, val_sources, strict=True):
        made = Preparation(source, tokenizer, share, shards).run()
        train.append(made[False])
        val.append(Preparation(val_source, tokenizer, 1.0, shards).run()[True] if val_source else made[True])
    weights = tuple(getattr(config, "weight", 1.0) for config in data.sources)
    names = tuple((stream or source).name for source in sources)
    return PreparedData(names, weights, tokenizer, Part(tuple(train)), Part(tuple(val)), stream)


def fitted_tokenizer(data: DataConfig, sources: list[Source], shares: list[float]) -> Tokenizer:
    """The tokenizer; one that is trained is so on the training documents, once for the same ones."""
    if not is_trained(data.tokenizer):
        return build_tokenizer(data.tokenizer, data.cache_dir, bos=data.bos, eos=data.eos)
    key = [data.tokenizer, data.bos, data.eos, shares, [source.digest() for source in sources]]
    path = Path(data.cache_dir) / "tokenizers" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with waited_for(FileLock(path.with_suffix(".lock"))):
            if not path.exists():  # another process may have made it meanwhile
                chunks = chain.from_iterable(map(split_source, sources, shares))
                texts = (chunk.text for chunk in chunks if not chunk.validation)
                tokenizer = build_tokenizer(data.tokenizer, data.cache_dir, texts, data.bos, data.eos)
                unfinished = path.with_suffix(".unfinished")
                unfinished.write_text(json.dumps({"fingerprint": tokenizer.fingerprint, "note": tokenizer.note} | tokenizer.state()))
                os.replace(unfinished, path)
    try:
        state = json.loads(path.read_text())
        tokenizer = from_state(state)
        tokenizer.note = state.get("note", "")
        whole = tokenizer.fingerprint == state["fingerprint"]
    except Exception:  # the library raises the bare class
        whole = False
    if not whole:
        raise UserError(f"the tokenizer {path} is damaged; delete it to train it again")
    return tokenizer


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

    said = TextColumn("tokenising {task.description}", markup=False), TextColumn("{task.fields[text]}")
    columns = (SpinnerColumn(), said[0], BarColumn(24), said[1], TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(source.name, total=source.size, text="")

        def advance(more_bytes: int, more_tokens: int) -> None:
            nonlocal total, tokens, last
            total, tokens = total + more_bytes, tokens + more_tokens
            bar.update(task, completed=source.position if source.size else 0, text=text())
            if not console.is_terminal and time.monotonic() - last > 5:
                share = f"{source.position / source.size:.0%}, " if source.size and source.position else ""
                console.print(f"tokenising {source.name}: {share}{text()}", soft_wrap=True)
                last = time.monotonic()

        yield advance
