"""Documents split into train and validation, and cut into chunks for a tokenizer."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pocketlm.corpus.pieces import Piece, Source
from pocketlm.tokenizer.base import Tokenizer

UNCUT = 2**22  # characters; a longer word is cut all the same


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


def single_document_bytes(pieces: Iterable[Piece]) -> int | None:
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
    border = (
        0 if lone is None else int(lone * (1 - share))
    )  # in bytes of the lone document from here on
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


def at_token_boundaries(chunks: Iterable[Chunk], tokenizer: Tokenizer) -> Iterator[Chunk]:
    """The same documents, in chunks that have the same ids apart as together."""
    held, begins = "", True
    for chunk in chunks:
        text = held + chunk.text
        if chunk.ends:
            yield Chunk(chunk.validation, text, begins, True)
            held, begins = "", True
            continue
        cut = tokenizer.cut(text)
        if not cut and len(text) >= UNCUT:
            cut = len(text)
        if cut:
            yield Chunk(chunk.validation, text[:cut], begins, False)
            begins = False
        held = text[cut:]


def batch_chunks(chunks: Iterable[Chunk], characters: int) -> Iterator[list[Chunk]]:
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


def split_source(source: Source, share: float) -> Iterator[Chunk]:
    """The documents of a source, each on its side."""
    lone = single_document_bytes(source.pieces()) if 0 < share < 1 else None
    return split(source.pieces(), share, lone)
