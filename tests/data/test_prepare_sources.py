"""Preparation of several sources: a validation source, a mixture, a stream."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pocketlm.config.sections import DataConfig, MixtureConfig
from pocketlm.corpus import pieces
from pocketlm.corpus.chunks import is_validation
from pocketlm.corpus.sources import open_source
from pocketlm.data.prepare import PreparedData, prepare
from pocketlm.errors import UserError
from tests.support.preparation import (
    byte_config,
    expected_content,
    only_shard,
    shard_content,
    write_jsonl,
    write_text,
)

# ---- a validation source ----


def test_with_val_path_all_of_it_is_validation_and_val_share_is_ignored(tmp_path):
    one, two = [f"one {i}" for i in range(30)], [f"two {i}" for i in range(20)]
    path = write_jsonl(tmp_path / "1.jsonl", one)
    val_path = write_jsonl(tmp_path / "2.jsonl", two)
    data, again = (
        prepare(byte_config(tmp_path, path=path, val_path=val_path, val_share=share))
        for share in (0.05, 0.9)
    )
    train, val = only_shard(data.train), only_shard(data.val)
    assert shard_content(train) == expected_content(one, str.encode, None, 256)
    assert shard_content(val) == expected_content(two, str.encode, None, 256)
    assert (only_shard(again.train).path, only_shard(again.val).path) == (train.path, val.path)
    assert train.path.parent != val.path.parent


def test_a_trained_tokenizer_does_not_see_val_path(tmp_path):
    path, val_path = write_text(tmp_path / "1.txt", "abc"), write_text(tmp_path / "2.txt", "abcd")
    config = byte_config(tmp_path, path=path, val_path=val_path, tokenizer="char")
    assert prepare(config).tokenizer.symbols == "abc"


def test_seen_bytes_are_those_of_all_documents_since_it_knows_no_other(tmp_path):
    """Each document has its own letter, as has val_path, so that validation would be unknown."""
    documents = [f"{letter}x" for letter in "abcdefghijklmnopqrstuvw"]
    assert {is_validation(document, 0.3) for document in documents} == {True, False}
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    config = byte_config(tmp_path, tokenizer="seen-bytes", path=path, val_share=0.3)
    assert bytes(prepare(config).tokenizer.seen) == b"abcdefghijklmnopqrstuvwx"
    val_path = write_jsonl(tmp_path / "b.jsonl", ["zx"])
    data = prepare(dataclasses.replace(config, val_path=val_path))
    assert bytes(data.tokenizer.seen) == b"abcdefghijklmnopqrstuvwxz"


def test_the_note_of_a_limited_vocabulary_is_kept_with_the_tokenizer(tmp_path):
    documents = [f"{letter}xyz" for letter in "abcdefghijklmnopqrstuvw"]
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    config = byte_config(tmp_path, tokenizer="char:5", path=path)
    first, second = (prepare(config).tokenizer.note for _ in range(2))
    assert first == second
    assert "char:5 keeps the 3 most common" in first


def test_the_same_text_for_both_splits_has_a_shard_of_each(tmp_path):
    path, val_path = write_text(tmp_path / "1.txt", "abc"), write_text(tmp_path / "2.txt", "abc")
    data = prepare(byte_config(tmp_path, path=path, val_path=val_path))
    train, val = only_shard(data.train), only_shard(data.val)
    assert (train.path.name, val.path.name) == ("train.bin", "val.bin")
    expected = expected_content(["abc"], str.encode, None, 256)
    assert shard_content(train) == shard_content(val) == expected


# ---- a mixture ----

ONE = [f"one {i}" for i in range(40)]
TWO = [f"deux {i} é" for i in range(40)]


def mixture(folder: Path) -> tuple[MixtureConfig, ...]:
    """Return two sources that are split, and one that has a validation source."""
    three, val = write_text(folder / "3.txt", "xyz"), write_text(folder / "4.txt", "qqq")
    return (
        MixtureConfig(path=write_jsonl(folder / "1.jsonl", ONE), weight=3.0),
        MixtureConfig(path=write_jsonl(folder / "2.jsonl", TWO)),
        MixtureConfig(path=three, val_path=val, weight=0.5),
    )


def prepare_mixture(folder: Path, sources: tuple[MixtureConfig, ...]) -> PreparedData:
    cache = str(folder / "cache")
    return prepare(DataConfig(mixture=sources, tokenizer="char", cache_dir=cache, val_share=0.3))


def test_a_mixture_has_a_shard_of_each_source_and_one_tokenizer_of_all(tmp_path):
    sources = mixture(tmp_path)
    data = prepare_mixture(tmp_path, sources)
    assert data.sources == tuple(source.path for source in sources)
    assert data.name == " + ".join(source.path for source in sources)
    assert data.weights == (3.0, 1.0, 0.5)
    train = [[text for text in source if not is_validation(text, 0.3)] for source in (ONE, TWO)]
    val = [[text for text in source if is_validation(text, 0.3)] for source in (ONE, TWO)]
    train.append(["xyz"])
    val.append(["qqq"])
    tokenizer = data.tokenizer
    assert set(tokenizer.symbols) == set("".join(text for source in train for text in source))
    for split, expected in ((data.train, train), (data.val, val)):
        for shard, documents in zip(split.shards, expected, strict=True):
            content = expected_content(documents, tokenizer.encode, None, tokenizer.eos_id)
            assert shard_content(shard) == content
        texts = [text for documents in expected for text in documents]
        assert split.n_documents == len(texts)
        assert split.n_bytes == sum(len(text.encode()) for text in texts)
        assert split.n_targets == split.n_tokens - 3


def test_other_weights_of_a_mixture_use_the_same_shards(tmp_path):
    sources = mixture(tmp_path)
    data = prepare_mixture(tmp_path, sources)
    other = prepare_mixture(tmp_path, (dataclasses.replace(sources[0], weight=2.0), *sources[1:]))
    paths = [shard.path for shard in data.train.shards]
    assert [shard.path for shard in other.train.shards] == paths
    assert other.sha256 != data.sha256


# ---- a stream ----


def prepare_stream(folder: Path, documents: list[str], **changes: object) -> PreparedData:
    keys = {"path": write_jsonl(folder / "x.jsonl", documents), "val_share": 0.3, **changes}
    return prepare(byte_config(folder, streaming=True, **keys))


def test_a_stream_prepares_its_first_documents_only(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "MAX_FIRST_DOCUMENTS", 25)
    documents = [f"document {i}" for i in range(100)]
    data = prepare_stream(tmp_path, documents, tokenizer="char")
    tokenizer = data.tokenizer
    for split, val in ((data.train, False), (data.val, True)):
        first = [document for document in documents[:25] if is_validation(document, 0.3) == val]
        expected = expected_content(first, tokenizer.encode, None, tokenizer.eos_id)
        assert shard_content(only_shard(split)) == expected
    assert [text for text, _ in data.stream.pieces()] == documents
    assert data.sources == (data.stream.name,) == (str(tmp_path / "x.jsonl"),)


@pytest.mark.parametrize("characters, count", [(35, 4), (40, 4), (41, 5), (1, 2)])
def test_the_first_documents_are_fewer_if_they_are_long_but_at_least_two(
    tmp_path, monkeypatch, small, characters, count
):
    monkeypatch.setattr(pieces, "MAX_FIRST_CHARACTERS", characters)
    documents = [f"document {i}" for i in range(9)]
    config = DataConfig(path=write_jsonl(tmp_path / "x.jsonl", documents))
    first = pieces.FirstDocuments(open_source(config, ""))
    expected = [(document, True) for document in documents[:count]]
    assert list(first.pieces()) == list(first.pieces()) == expected
    small(7, 100)
    first = pieces.FirstDocuments(first.source)
    marked = "".join(text + "|" * is_last for text, is_last in first.pieces())
    assert marked == "".join(f"{document}|" for document in documents[:count])


def test_a_source_that_cannot_be_streamed_is_named(tmp_path):
    message = "data.streaming deals out documents, and .*x.jsonl is a single one"
    with pytest.raises(UserError, match=message):
        prepare_stream(tmp_path, ["one document"])
    np.arange(8, dtype="<u2").tofile(tmp_path / "x.bin")
    with pytest.raises(UserError, match="x.bin is tokens already; set data.streaming to false"):
        prepare_stream(tmp_path, [], path=str(tmp_path / "x.bin"))
