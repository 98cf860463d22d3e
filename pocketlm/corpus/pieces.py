"""Pieces of documents: what every source yields, and how blocks of text are cut into them.

A piece is `(text, is_last)`: at most PIECE_CHARACTERS of a document's text, and whether the
document ends with them. Pieces keep memory constant for a single document of many gigabytes. A
block is text as it was read from a file, which may hold several documents or a part of one.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

PIECE_CHARACTERS = 2**20

Piece = tuple[str, bool]


@dataclass
class ByteAccount:
    """Bytes of a source that are not in its documents, by the reason.

    A reason has a negative number if it made the text longer, as the change from UTF-16 may.
    """

    bytes: int = 0  # of the source
    left_out: Counter[str] = field(default_factory=Counter)

    def leave_out(self, reason: str, size: int) -> None:
        """Count bytes that are in no document."""
        if size:
            self.left_out[reason] += size

    def add(self, other: "ByteAccount") -> None:
        """Add another account to this one."""
        self.bytes += other.bytes
        self.left_out.update(other.left_out)


@dataclass(frozen=True)
class Part:
    """Part number `index`, from 0, of `count` equal stretches of a source's positions.

    >>> [Part(0, 3).owner(position, 90) for position in (0, 29, 30, 89, 90)]
    [0, 0, 1, 2, 2]
    """

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def owner(self, position: int, size: int) -> int:
        """Return the index of the part that has a position; the end belongs to the last part."""
        return min(self.count - 1, position * self.count // max(size, 1))

    def positions(self, size: int) -> range:
        """Return the positions of this part, below `size`.

        >>> [list(Part(index, 3).positions(4)) for index in range(3)]
        [[0, 1], [2], [3]]
        """
        first, end = (-(-index * size // self.count) for index in (self.index, self.index + 1))
        return range(first, end)


WHOLE = Part()


class Source:
    """Base class of everything that yields documents.

    A source that knows its `size` in bytes updates `position`, the bytes read so far. `account` is
    that of the last complete reading. `remarks` are sentences for the user on what is not read.

    A source that can be read in parts is `divisible`. While it yields a piece, its `place` says to
    which part that piece belongs; it does not depend on where the reading began.
    """

    name: str
    size: int | None = None
    position = 0
    divisible = False
    account = ByteAccount()
    remarks: tuple[str, ...] = ()

    def documents(self) -> Iterator[str]:
        """Yield every document as a whole string, always in the same order.

        A source whose documents may be long implements `pieces` instead.
        """
        raise NotImplementedError

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents that are not blank, in pieces.

        All pieces of a document have PIECE_CHARACTERS, except the last, which may be shorter.
        """
        account = self.account = ByteAccount()
        documents = ((document, True) for document in self.documents())
        yield from resize_pieces(counted(documents, account), account)

    @property
    def place(self) -> int:
        """The position by which a piece belongs to a part."""
        return self.position

    def part_pieces(self, part: Part) -> Iterator[Piece]:
        """Yield whole documents, all that are in the part or begin before and end in it.

        There may be others around them. `account` is that of the part: those of all parts add up
        to the source's.
        """
        raise NotImplementedError

    def digest(self) -> str:
        """Return the SHA-256 of everything that decides the documents.

        The default hashes the documents themselves.
        """
        digest = hashlib.sha256()
        for text, is_last in self.pieces():
            digest.update(text.encode())
            if is_last:
                digest.update(b"\0\xff")  # a sequence that is never in UTF-8
        return digest.hexdigest()


# ---- blocks of text -> pieces ----


def split_on_separator(blocks: Iterable[str], separator: str) -> Iterator[Piece]:
    """Yield the texts between separators; a text longer than a piece comes in several.

    >>> list(split_on_separator(["one<e", ">tw", "o"], "<e>"))
    [('one', True), ('two', True)]
    """
    rest = ""
    for block in blocks:
        *complete, rest = join_texts([rest, block]).split(separator)
        for text in complete:
            yield text, True
        if len(rest) > PIECE_CHARACTERS + len(separator):
            # The end of `rest` may be the first part of a separator, so it is kept back.
            yield rest[: -len(separator)], False
            rest = rest[-len(separator) :]
    if rest:
        yield rest, True


def merge_leading_blanks(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Merge a document's leading blank pieces into its first piece that is not blank.

    A document of white space only becomes one piece.

    >>> pieces = [(" ", False), ("a", False), (" ", True), (" ", False), (" ", True)]
    >>> list(merge_leading_blanks(pieces))
    [(' a', False), (' ', True), ('  ', True)]
    """
    pending: list[str] = []
    blank = True
    for text, is_last in pieces:
        blank = blank and (not text or text.isspace())
        if pending or (blank and not is_last):
            pending.append(text)
        if is_last or not blank:
            yield join_texts(pending) if pending else text, is_last
            pending, blank = [], is_last


def split_on_blank_lines(lines: Iterable[Piece]) -> Iterator[Piece]:
    """Join lines to documents that end at blank lines. Some of the documents are empty.

    >>> list(split_on_blank_lines([("a", True), ("b", True), (" ", True), ("c", True)]))
    [('a', False), ('\\nb', False), ('', True), ('c', False), ('', True)]
    """
    line_end = ""  # written before the next line of the same document
    starts_line = True
    for text, is_last in merge_leading_blanks(lines):
        if starts_line and not text.strip():
            yield "", True
            line_end = ""
            continue
        if starts_line:
            text = line_end + text
        if is_last:
            line_end = "\r\n" if text.endswith("\r") else "\n"
            text = text.removesuffix("\r")
        yield text, False
        starts_line = is_last
    yield "", True


def counted(pieces: Iterable[Piece], account: ByteAccount) -> Iterator[Piece]:
    """Yield the pieces, and count their bytes as those of the source."""
    for text, is_last in pieces:
        account.bytes += len(text.encode())
        yield text, is_last


def resize_pieces(pieces: Iterable[Piece], account: ByteAccount) -> Iterator[Piece]:
    """Drop blank documents and cut the others into pieces of PIECE_CHARACTERS.

    The cuts depend on the document alone, not on the pieces that came in, so that equal documents
    have equal first pieces wherever they are in a file.
    """
    pending: list[str] = []
    size = 0
    for text, is_last in merge_leading_blanks(pieces):
        if not pending and (not text or text.isspace()):
            account.leave_out("documents of white space", len(text.encode()))
            continue
        if not pending and is_last and len(text) <= PIECE_CHARACTERS:  # the common case
            yield text, True
            continue
        pending.append(text)
        size += len(text)
        if is_last or size > PIECE_CHARACTERS:
            joined = join_texts(pending)
            last = (size - 1) // PIECE_CHARACTERS * PIECE_CHARACTERS
            for start in range(0, last, PIECE_CHARACTERS):
                yield joined[start : start + PIECE_CHARACTERS], False
            if is_last:
                yield joined[last:], True
                pending, size = [], 0
            else:
                pending, size = [joined[last:]], size - last


def join_texts(texts: list[str]) -> str:
    """Return the texts as one.

    All copying of growing texts goes through here, so that a test can count the characters.
    """
    return "".join(texts)


def hash_files(files: list[Path], settings: list[Any], versions: Iterable[str] = ()) -> str:
    """Return the SHA-256 of the files' bytes, in this order, and of how they are read.

    `settings` are the options of the reader, `versions` those of the code that reads.
    """
    with ThreadPoolExecutor() as pool:  # hashing releases Python's global lock
        digests = [*versions, *pool.map(sha256_of_file, files)]
    return hashlib.sha256(json.dumps([settings, digests]).encode()).hexdigest()


def sha256_of_file(file: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# ---- the beginning of a source ----

# Streaming reads the documents up to the first of these limits before training begins.
MAX_FIRST_DOCUMENTS = 10_000
MAX_FIRST_CHARACTERS = 2**26


class FirstDocuments(Source):
    """The first documents of a source, at least two, read once and kept in memory."""

    def __init__(self, source: Source):
        self.source = source
        self.name, self.remarks = f"the first documents of {source.name}", source.remarks

    @cached_property
    def buffer(self) -> list[Piece]:
        """All pieces of the first documents."""
        buffer: list[Piece] = []
        documents = characters = 0
        for text, is_last in self.source.pieces():
            buffer.append((text, is_last))
            documents += is_last
            characters += len(text)
            full = documents > 1 and characters >= MAX_FIRST_CHARACTERS
            if is_last and (full or documents >= MAX_FIRST_DOCUMENTS):
                break
        return buffer

    def pieces(self) -> Iterator[Piece]:
        return iter(self.buffer)
