"""Documents to the train and validation splits, and a single document cut in two."""

import hashlib
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pocketlm.config.sections import DataConfig
from pocketlm.corpus.chunks import (
    SPLITS,
    Chunk,
    is_validation,
    split_documents,
    split_single_document,
    split_source,
)
from pocketlm.corpus.sources import open_source

DATA = Path(__file__).parents[2] / "data"


def texts_of(chunks: list[Chunk], split: str) -> list[str]:
    return [chunk.text for chunk in chunks if chunk.split == split]


def test_the_validation_documents_of_wiki_never_change():
    """Losses of different versions compare only while these are the same documents."""
    chunks = list(split_source(open_source(DataConfig(source="wiki"), str(DATA)), 0.05))
    assert all(chunk.starts_document and chunk.ends_document for chunk in chunks)
    val = texts_of(chunks, "val")
    assert (len(texts_of(chunks, "train")), len(val)) == (9_281, 496)
    digests = sorted(hashlib.sha256(document.encode()).hexdigest() for document in val)
    assert (
        hashlib.sha256("".join(digests).encode()).hexdigest()
        == "eb64931d8848540b8d4defd8ef6dc7b7b7b51285ca2f75001f87e5c39be21417"
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(), min_size=2, max_size=20), st.floats(0.01, 0.99))
def test_every_document_is_in_one_split_and_equal_ones_in_the_same(documents, share):
    pieces = [(document, True) for document in documents * 2]
    chunks = list(split_documents(pieces, share))
    assert [chunk.text for chunk in chunks] == documents * 2
    assert not set(texts_of(chunks, "train")) & set(texts_of(chunks, "val"))


def test_the_share_is_the_share_and_a_larger_one_contains_it():
    documents = [str(i) for i in range(4000)]
    few = {document for document in documents if is_validation(document, 0.05)}
    many = {document for document in documents if is_validation(document, 0.2)}
    assert few < many
    # Four standard deviations of a fair draw.
    assert 0.2 * 4000 - 100 < len(many) < 0.2 * 4000 + 100


def test_the_pieces_of_a_document_stay_together():
    """The first piece of a document decides its split."""
    val = next(str(i) for i in range(100) if is_validation(str(i), 0.3))
    train = next(str(i) for i in range(100) if not is_validation(str(i), 0.3))
    pieces = [(val, False), (train, True), (train, False), (val, False), ("", True)]
    chunks = list(split_documents(pieces, 0.3))
    assert [chunk.split for chunk in chunks] == ["val", "val", "train", "train", "train"]
    assert [chunk.starts_document for chunk in chunks] == [True, False, True, False, False]
    assert [chunk.ends_document for chunk in chunks] == [False, True, False, False, True]


def test_a_tenth_of_tiny_shakespeares_bytes():
    """The character-level run of nanoGPT keeps 1,003,854 of 1,115,394 characters for training."""
    train, val = split_single_document([("a" * 1_115_394, True)], int(1_115_394 * (1 - 0.1)))
    assert (train.split, len(train.text)) == ("train", 1_003_854)
    assert (val.split, len(val.text)) == ("val", 111_540)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(alphabet="aé€😀\n", min_size=1, max_size=6), min_size=1, max_size=6),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
)
@example(["a" * 10], 1e-17)  # 1 - share is 1
@example(["ab", "cd", ""], 0.5)
@example(["ab", "€"], 0.4)
def test_a_single_document_gives_its_end_and_is_cut_between_characters(texts, share):
    raw = "".join(texts).encode()
    train_bytes = int(len(raw) * (1 - share))
    pieces = [(text, i == len(texts) - 1) for i, text in enumerate(texts)]
    chunks = list(split_single_document(pieces, train_bytes))
    starts = [i for i in range(len(raw) + 1) if i == len(raw) or raw[i] & 0xC0 != 0x80]
    cut = max(start for start in starts if start <= train_bytes)
    train, val = ([chunk for chunk in chunks if chunk.split == split] for split in SPLITS)
    assert chunks == train + val
    assert "".join(texts_of(chunks, "train")) == raw[:cut].decode()
    assert "".join(texts_of(chunks, "val")) == raw[cut:].decode()
    assert bool(train) == (cut > 0)
    for part in filter(None, (train, val)):
        later = [False] * (len(part) - 1)
        assert [chunk.starts_document for chunk in part] == [True, *later]
        assert [chunk.ends_document for chunk in part] == [*later, True]
