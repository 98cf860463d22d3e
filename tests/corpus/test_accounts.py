"""Accounts: every byte of the files is in a document, or counted by the reason why not."""

import csv
import io
import json
import os

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pocketlm.corpus.pieces import Source
from tests.support.sources import (
    SUFFIXES,
    documents_of,
    not_blank,
    open_path,
    read_path,
    refusal,
    small_pieces,
    write_file,
)


def account_of(path: object, **keys: object) -> tuple[int, int, dict[str, int]]:
    """Return the bytes of a path, those of its documents, and those left out by the reason."""
    source = open_path(path, **keys)
    in_documents = sum(len(document.encode()) for document in documents_of(source))
    return source.account.bytes, in_documents, dict(source.account.left_out)


# ---- for any text ----

TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(["", " ", "\n", "a\r\nb", " \n ", "é", "😀", '"', "x" * 40, "\ufeff"]),
    min_size=1,
    max_size=8,
)


def table(texts: list[str], delimiter: str) -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([["id", "text"], *enumerate(texts)])
    return sink.getvalue().encode()


def json_lines(texts: list[str]) -> bytes:
    lines = [json.dumps({"n": i, "text": text}) + "\r\n" for i, text in enumerate(texts)]
    return "".join(lines).encode()


CONTENT = {
    "x.txt": lambda texts: "<>".join(texts).encode(),
    "x.md": lambda texts: "\n\n".join(texts).encode(),
    "x.jsonl": json_lines,
    "x.csv": lambda texts: table(texts, ","),
    "x.tsv": lambda texts: table(texts, "\t"),
}


@settings(max_examples=300, deadline=None)
@given(
    texts=TEXTS,
    name=st.sampled_from(list(CONTENT)),
    suffix=st.sampled_from(SUFFIXES),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-32"]),
    separator=st.sampled_from([None, "line", "blank_line", "<>", "\n"]),
    size=st.sampled_from([1, 5, 1000]),
)
def test_every_byte_of_a_file_is_in_a_document_or_counted(
    folder, texts, name, suffix, encoding, separator, size
):
    raw = CONTENT[name](texts).decode().encode(encoding)
    path = write_file(folder, name + suffix, raw)
    with small_pieces(size):
        total, in_documents, left_out = account_of(path, separator=separator)
    assert total == len(raw)
    assert in_documents + sum(left_out.values()) == total
    change = left_out.pop(f"change from {encoding.upper()} to UTF-8", 0)
    assert change == len(raw) - len(raw.decode(encoding).encode())
    assert all(size > 0 for size in left_out.values())


@settings(max_examples=50, deadline=None)
@given(texts=TEXTS)
def test_every_byte_of_a_parquet_column_is_in_a_document_or_counted(folder, texts):
    parquet.write_table(pa.table({"id": range(len(texts)), "text": texts}), folder / "x.parquet")
    total, in_documents, left_out = account_of(folder / "x.parquet")
    assert total == len("".join(texts).encode()) == in_documents + sum(left_out.values())


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=30), size=st.integers(1, 9))
def test_bytes_that_are_replaced_are_counted(folder, raw, size):
    raw = b"\xffx" + raw  # no byte order mark
    path = write_file(folder, "x.txt", raw)
    with small_pieces(size):
        total, in_documents, left_out = account_of(path, errors="replace")
    assert (total, in_documents + sum(left_out.values())) == (len(raw), len(raw))
    replaced = "bytes that are not UTF-8, read as U+FFFD"
    assert left_out[replaced] == len(raw) - len(raw.decode(errors="replace").encode())


def test_every_byte_of_any_other_source_is_in_a_document_or_counted():
    class Texts(Source):
        def documents(self):
            yield from ["one", " \n", "", "zwei é"]

    source = Texts()
    assert documents_of(source) == ["one", "zwei é"]
    assert (source.account.bytes, dict(source.account.left_out)) == (
        12,
        {"documents of white space": 2},
    )


# ---- by hand ----


@pytest.mark.parametrize("name, raw, separator, left_out", [
    ("x.txt", b"one\ntwo\r\n", "line", {"separators between documents": 3}),
    ("x.txt", b"one\n \n\ntwo", "line", {"separators between documents": 3,
                                         "documents of white space": 1}),
    ("x.txt", b"one##two", "##", {"separators between documents": 2}),
    ("x.txt", b"one\r\n\r\ntwo", "blank_line", {"separators between documents": 4}),
    ("x.txt", b"one\ntwo", None, {}),
    ("x.jsonl", b'{"text": "\\u00e9"}\n', None, {"JSON syntax and other fields": 17}),
    ("x.csv", b'n,text\n1,"a ""b"""\n', None, {"CSV syntax and other columns": 14}),
    ("x.tsv", b"text\n\n", None, {"CSV syntax and other columns": 6}),
    ("x.txt", b"a __eou__ b __eou__\n", None, {"marks of DailyDialog's layout": 10}),
])  # fmt: skip
def test_what_is_left_out_is_counted_by_the_reason(tmp_path, name, raw, separator, left_out):
    assert account_of(write_file(tmp_path, name, raw), separator=separator)[2] == left_out


# ---- folders and patterns ----


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    names = ["a.txt", "page.html", "sub/b.html", "code.py.gz", "README", "d.json", ".hidden.txt"]
    for name in names:
        (tmp_path / "f" / name).write_bytes(b"text")
    os.symlink(tmp_path / "elsewhere", tmp_path / "f" / "link")
    source = open_path("f")
    assert documents_of(source) == ["text"]
    not_read = {reason: sorted(map(str, files)) for reason, files in source.not_read.items()}
    assert not_read == {
        "hidden files": ["f/.hidden.txt"],
        "files of other kinds": [
            "f/README", "f/code.py.gz", "f/d.json", "f/page.html", "f/sub/b.html"
        ],
        "folders that are links or match the pattern": ["f/link"],
    }  # fmt: skip
    kinds, folders = source.remarks
    assert kinds.startswith("not read in the folder f: files of other kinds (2 .html, ")
    assert kinds.endswith("name a pattern, such as 'f/**/*.html'")
    assert read_path("f/**/*.html") == ["text", "text"]
    assert folders == "not read by f: what is in the folders f/link"
    (tmp_path / "f" / "a.txt").unlink()
    assert "; not read in the folder f: files of other kinds (2 .html" in refusal("f")


def test_folders_that_a_pattern_matches_are_named_unless_their_files_match_too(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("text")
    (tmp_path / "a.txt").write_text("text")
    assert open_path(f"{tmp_path}/**").remarks == ()
    (remark,) = open_path(f"{tmp_path}/*").remarks
    assert remark.startswith(f"not read by {tmp_path}/*: what is in the folders ")
    assert not_blank([*open_path(f"{tmp_path}/*.txt").remarks]) == []
