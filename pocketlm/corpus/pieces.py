"""Documents in pieces: what every source yields, and how text in blocks becomes it."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

PIECE = 2**20  # characters


Piece = tuple[str, bool]  # text, and whether its document ends with it


class Source:
    """Where documents come from. `position` of `size` bytes have been read, where a source can tell."""

    name: str
    size: int | None = None
    position = 0

    def documents(self) -> Iterator[str]:
        """Every document, whole, in an order that is always the same; where they may be long, a source has `pieces` alone."""
        raise NotImplementedError

    def pieces(self) -> Iterator[Piece]:
        """The documents that are not blank, in pieces of PIECE characters, the last of each at most as long."""
        return in_pieces((document, True) for document in self.documents())

    def digest(self) -> str:
        """SHA-256 of all that decides the documents: here the documents themselves."""
        digest = hashlib.sha256()
        for text, ends in self.pieces():
            digest.update(text.encode() + (b"\0\xff" if ends else b""))  # which UTF-8 never holds
        return digest.hexdigest()


# ---- text in blocks -> pieces ----------------------------------------------------------------------------------------


def split_at(blocks: Iterable[str], separator: str) -> Iterator[Piece]:
    """The texts between separators; one longer than PIECE in pieces.

    >>> list(split_at(["one<e", ">tw", "o"], "<e>"))
    [('one', True), ('two', True)]
    """
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split(separator)
        for text in whole:
            yield text, True
        if len(rest) > PIECE + len(separator):  # whose end may be the beginning of a separator
            yield rest[: -len(separator)], False
            rest = rest[-len(separator) :]
    if rest:
        yield rest, True


def merge_leading_blanks(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same texts; but one that is not blank does not begin with a blank piece, and one that is comes whole.

    >>> list(merge_leading_blanks([(" ", False), ("a", False), (" ", True), (" ", False), (" ", True)]))
    [(' a', False), (' ', True), ('  ', True)]
    """
    held: list[str] = []
    blank = True
    for text, ends in pieces:
        blank = blank and (not text or text.isspace())
        if held or blank and not ends:
            held.append(text)
        if ends or not blank:
            yield "".join(held) if held else text, ends
            held, blank = [], ends


def paragraphs(lines: Iterable[Piece]) -> Iterator[Piece]:
    """Documents of lines that blank lines end; `lines` are pieces of them. Some of the documents are empty.

    >>> list(paragraphs([("a", True), ("b", True), (" ", True), ("c", True)]))
    [('a', False), ('\\nb', False), ('', True), ('c', False), ('', True)]
    """
    between, at_start = "", True  # what is between two lines of a document; whether a line begins
    for text, ends in merge_leading_blanks(lines):
        if at_start and not text.strip():
            yield "", True
            between = ""
            continue
        text = between + text if at_start else text
        if ends:
            between = "\r\n" if text.endswith("\r") else "\n"
            text = text.removesuffix("\r")
        yield text, False
        at_start = ends
    yield "", True


def in_pieces(parts: Iterable[Piece]) -> Iterator[Piece]:
    """Leave out documents of nothing but white space, and bring the others to pieces of PIECE characters, the last one shorter."""
    held: list[str] = []
    size = 0
    for text, ends in merge_leading_blanks(parts):
        if not held and (not text or text.isspace()):
            continue
        if not held and ends and len(text) <= PIECE:  # as most are
            yield text, True
            continue
        held.append(text)
        size += len(text)
        if ends or size > PIECE:
            whole = "".join(held)
            last = (size - 1) // PIECE * PIECE
            for start in range(0, last, PIECE):
                yield whole[start : start + PIECE], False
            if ends:
                yield whole[last:], True
            held, size = ([], 0) if ends else ([whole[last:]], size - last)


def hash_files(files: list[Path], settings: list, versions: Iterable[str] = ()) -> str:
    """SHA-256 of the files' bytes, in this order, of the settings they are read with, and of the versions of the code that does."""

    def sha256(file: Path) -> str:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing does not hold Python's lock
        return hashlib.sha256(
            json.dumps([settings, [*versions, *pool.map(sha256, files)]]).encode()
        ).hexdigest()


HEAD_DOCUMENTS, HEAD_CHARACTERS = (
    10_000,
    2**26,
)  # what streaming looks at before it begins, whichever comes first


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
            if ends and (
                documents >= HEAD_DOCUMENTS or documents > 1 and characters >= HEAD_CHARACTERS
            ):
                break
        return read

    def pieces(self) -> Iterator[Piece]:
        return iter(self.read)
