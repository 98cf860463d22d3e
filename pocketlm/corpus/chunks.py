"""Chunks: documents assigned to the train or validation split, and cut to sizes for a tokenizer.

    Source.pieces() -> split_source -> at_token_boundaries -> batch_chunks -> Tokenizer

The split of a document is a hash of its text, so it is the same on every machine and in every run.
A corpus of a single document is cut in two instead.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pocketlm.corpus.pieces import WHOLE, Part, Piece, Source
from pocketlm.tokenizer.base import Tokenizer

MAX_UNCUT_CHARACTERS = 2**22  # a longer text without a token boundary is cut anyway

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")


@dataclass(frozen=True)
class Chunk:
    """A document, or a part of one, with the split that the document belongs to."""

    split: Split
    text: str
    starts_document: bool = True
    ends_document: bool = True


# ---- documents -> train and validation ----


def is_validation(document: str, val_share: float) -> bool:
    """Return whether a hash of the text falls into the validation share.

    The answer is the same everywhere, and equal texts have the same answer.
    """
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_share * 2**64


def split_source(source: Source, val_share: float, part: Part = WHOLE) -> Iterator[Chunk]:
    """Yield the documents of a source, or those that `part_pieces` yields, with their splits.

    If there is only one document in the source, its last `val_share` is the validation split.
    """
    single_bytes = single_document_bytes(source.pieces()) if 0 < val_share < 1 else None
    pieces = source.pieces() if part == WHOLE else source.part_pieces(part)
    if single_bytes is None:
        yield from split_documents(pieces, val_share)
    else:
        yield from split_single_document(pieces, int(single_bytes * (1 - val_share)))


def chunks_of_part(chunks: Iterable[Chunk], source: Source, part: Part) -> Iterator[Chunk]:
    """Yield the chunks that belong to the part; the chunks of `source` come in order of place.

    Whether a chunk belongs to a part depends on the source alone, so all parts together have every
    chunk once.
    """
    for chunk in chunks:
        owner = part.owner(source.place, source.size or 0)
        if owner > part.index:
            return
        if owner == part.index:
            yield chunk


def single_document_bytes(pieces: Iterable[Piece]) -> int | None:
    """Return the UTF-8 bytes of the only document, or None if there are none or several."""
    size, complete = 0, False
    for text, is_last in pieces:
        if complete:
            return None
        size += len(text.encode())
        complete = is_last
    return size or None


def split_documents(pieces: Iterable[Piece], val_share: float) -> Iterator[Chunk]:
    """Assign each document to a split by a hash of its first piece."""
    split: Split = "train"
    starts = True
    for text, is_last in pieces:
        if starts:
            split = "val" if is_validation(text, val_share) else "train"
        yield Chunk(split, text, starts, is_last)
        starts = is_last


def split_single_document(pieces: Iterable[Piece], train_bytes: int) -> Iterator[Chunk]:
    """Cut one document into `train_bytes` for training and the rest for validation.

    The cut is moved to the left where it would be inside a character.
    """
    left = train_bytes
    starts = True
    after_cut = False
    for text, is_last in pieces:
        if after_cut:
            yield Chunk("val", text, False, is_last)
            continue
        raw = text.encode()
        if not is_last and left >= len(raw):
            yield Chunk("train", text, starts, False)
            starts = False
            left -= len(raw)
            continue
        cut = character_start(raw, left)
        if cut or not starts:
            yield Chunk("train", raw[:cut].decode(), starts, True)
        yield Chunk("val", raw[cut:].decode(), True, is_last)
        after_cut = True


def character_start(raw: bytes, index: int) -> int:
    """Return the index itself, or the start of the UTF-8 character that it is inside of."""
    while 0 < index < len(raw) and raw[index] & 0xC0 == 0x80:
        index -= 1
    return index


# ---- chunks for a tokenizer ----


def at_token_boundaries(chunks: Iterable[Chunk], tokenizer: Tokenizer) -> Iterator[Chunk]:
    """Re-chunk documents so that encoding chunk by chunk gives the ids of the whole document."""
    pending, starts = "", True
    for chunk in chunks:
        text = pending + chunk.text
        if chunk.ends_document:
            yield Chunk(chunk.split, text, starts, True)
            pending, starts = "", True
            continue
        cut = tokenizer.last_token_boundary(text)
        if not cut and len(text) >= MAX_UNCUT_CHARACTERS:
            cut = len(text)
        if cut:
            yield Chunk(chunk.split, text[:cut], starts, False)
            starts = False
        pending = text[cut:]


def batch_chunks(chunks: Iterable[Chunk], characters: int) -> Iterator[list[Chunk]]:
    """Yield lists of chunks with about `characters` characters each."""
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
