"""The digest of a source: everything that decides the documents, and nothing else."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets

from pocketlm.config.sections import SourceConfig
from pocketlm.corpus import pieces, readers, sources
from pocketlm.corpus.pieces import Source
from pocketlm.corpus.sources import open_source
from tests.support.sources import (
    open_path,
    write_file,
)

DATA = Path(__file__).parents[2] / "data"


def test_the_digest_is_of_the_bytes_and_not_of_the_path(tmp_path):
    (tmp_path / "f").mkdir()
    a, b = write_file(tmp_path, "a.txt", b"text"), write_file(tmp_path / "f", "b.md", b"text")
    digests = {open_path(path).digest() for path in (a, b, tmp_path / "f", f"{tmp_path}/*.txt")}
    assert len(digests) == 1
    assert re.fullmatch("[0-9a-f]{64}", digests.pop())


def test_every_byte_and_every_setting_counts_in_the_digest(tmp_path):
    raw = b'text\ttext,n\n"a"\t"b",7\n'
    (tmp_path / "f").mkdir()

    def digest(name: str, content: bytes = raw, **keys: str) -> str:
        return open_path(write_file(tmp_path, name, content), **keys).digest()

    digests = [
        digest("x.txt", raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :]) for i in range(len(raw))
    ]
    digests += [digest(name) for name in ("x.txt", "x.csv", "x.tsv", "x.jsonl")]
    digests += [digest("x.txt", raw + b"\n"), digest("x.txt", b"")]
    for separator in ("line", "blank_line", "<>", "\n"):
        digests.append(digest("x.txt", separator=separator))
    digests += [digest("x.txt", errors="replace"), digest("x.csv", text_field="n")]
    for name in ("x.md.gz", "x.md.zst"):  # the same bytes, but compressed by their names
        (tmp_path / name).write_bytes(raw)
        digests.append(open_path(tmp_path / name).digest())
    for parts in ((raw, raw), (raw[:5], raw[5:]), (raw[5:], raw[:5]), (raw, b""), (b"", raw)):
        for number, part in enumerate(parts):
            write_file(tmp_path / "f", f"{number}.txt", part)
        digests.append(open_path(tmp_path / "f").digest())
    assert len(set(digests)) == len(digests) == len(raw) + 19


def test_keys_of_other_sources_do_not_count_in_the_digest(tmp_path):
    path = write_file(tmp_path, "x.txt", b"text")
    keys = {"split": "test", "revision": "main", "config_name": "en", "val_path": "y"}
    assert open_path(path, **keys).digest() == open_path(path).digest()


def test_the_digest_of_a_saved_dataset_is_of_its_content(tmp_path):
    def digest(name: str, rows: dict, **keys: str) -> str:
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / name)
        return open_path(tmp_path / name, **keys).digest()

    rows = {"text": ["a", "b"], "body": ["c", "d"]}
    assert digest("one", rows) == digest("two", rows)
    others = [
        digest("three", {**rows, "text": ["a", "c"]}),
        digest("four", rows, text_field="body"),
        digest("five", {**rows, "text": ["b", "a"]}),
    ]
    assert len({digest("one", rows), *others}) == 4


class Texts(Source):
    """A source of these documents."""

    def __init__(self, *texts: str):
        self.texts = texts

    def documents(self) -> Iterator[str]:
        yield from self.texts


def test_the_digest_of_documents_depends_on_the_documents_only(monkeypatch):
    lists = [(), ("a",), ("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab")]
    lists += [("ab\0", "c"), ("ab", "\0c"), ("ab\ufffd", "c")]
    digests = [Texts(*texts).digest() for texts in lists]
    assert len(set(digests)) == len(lists)
    assert Texts("ab", "", " \n", "c").digest() == digests[2]
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1)
    assert [Texts(*texts).digest() for texts in lists] == digests


def test_the_digest_of_a_named_corpus_is_of_its_wheel_and_of_its_version(monkeypatch):
    """The first version has the digests from before there were versions.

    So the shards that were prepared then are found.
    """

    def digest(name: str) -> str:
        return open_source(SourceConfig(source=name), str(DATA)).digest()

    before = [digest("names"), digest("wiki")]
    assert before[0] != before[1]
    assert digest("names") == before[0]
    first = [
        "2b817a81028fc73c107ed2aecdc52235fa3176bfe0d34b2a54d9404e6cde267e",
        "3c329a34b43ef4b9ce3a9463d756b78ce05bcae7ab31ca63459fd15f5544d467",
    ]
    assert before == first
    monkeypatch.setitem(sources.VERSIONS, "names", "2")
    assert digest("names") != before[0]
    assert digest("wiki") == before[1]


def test_the_digest_of_a_shipped_corpus_is_of_its_file_and_of_its_version(tmp_path, monkeypatch):
    """It needs no network and no data folder."""

    def open_wheel(name: str, data_dir: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(sources, "open_wheel", open_wheel)
    source = open_source(SourceConfig(source="korean_names"), str(tmp_path / "nowhere"))
    before = source.digest()
    assert re.fullmatch("[0-9a-f]{64}", before)
    names = Path(shutil.copy(sources.SHIPPED["korean_names"], tmp_path / "names.txt"))
    monkeypatch.setitem(sources.SHIPPED, "korean_names", names)
    assert source.digest() == before
    content = names.read_bytes()
    names.write_bytes(content + b"\n")
    assert source.digest() != before
    names.write_bytes(content)
    assert source.digest() == before
    monkeypatch.setitem(sources.VERSIONS, "korean_names", "2")
    assert source.digest() != before
