"""The files that a path names: folders, patterns, kinds, and what is refused."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from pocketlm.corpus.input_files import FILE_KINDS, kind_of
from pocketlm.errors import UserError
from tests.support.sources import (
    documents_of,
    open_path,
    read_path,
    refusal,
    write_file,
)


def write_mixed(folder: Path) -> None:
    """Write files of every kind, and files that are not text.

    The documents are letters, in the order of the files' names.
    """
    (folder / "k" / "deep").mkdir(parents=True)
    for hidden in (".git", "k/.ipynb_checkpoints"):
        (folder / hidden).mkdir()
        (folder / hidden / "x.txt").write_text("hidden")
    for name in (".hidden.txt", "k/.x.jsonl"):
        (folder / name).write_text("hidden")
    for name in ("README", "picture.png", "dataset_info.json", "a.txt.bz2", "k/x.arrow", ".gz"):
        (folder / name).write_bytes(b"\xff no text")
    write_file(folder, "B.txt", b"A")
    write_file(folder, "a.md", b"B")
    write_file(folder, "c.csv", b"text\nC\n")
    write_file(folder, "d.jsonl.gz", b'{"text": "D"}\n')
    write_file(folder, "e.ndjson", b'{"text": "E"}')
    parquet.write_table(pa.table({"text": ["F"]}), folder / "f.parquet")
    write_file(folder, "k/deep/g.TXT.ZST", b"G")
    write_file(folder, "k/h.tsv", b"text\tn\nH\t1\n")
    write_file(folder, "z.txt", b"I")


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write_mixed(tmp_path)
    assert read_path(tmp_path) == list("ABCDEFGHI")
    assert read_path(f"{tmp_path}/") == list("ABCDEFGHI")
    kinds = ["text", "text", "csv", "jsonl", "jsonl", "parquet", "text", "tsv", "text"]
    assert [kind_of(file) for file in open_path(tmp_path).files] == kinds


@pytest.mark.parametrize("pattern, expected", [
    ("*.txt", "AI"), ("[ab].*", "B"), ("?.*", "ABCDEFI"), ("**/*.txt", "AI"), ("k/*", "H"),
    ("**/*.[tT][sSxX]*", "AGHI"), ("k*/**/*.*", "GH"), ("[B].txt", "A"), ("k/../z.*", "I"),
    ("**", "ABCDEFGHI"),
])  # fmt: skip
def test_a_pattern_is_the_files_that_a_shell_gives(tmp_path, monkeypatch, pattern, expected):
    """A pattern matches a hidden file only if it begins with a dot, and never a folder."""
    write_mixed(tmp_path)
    for name in ("README", "picture.png", "dataset_info.json", "a.txt.bz2", "k/x.arrow"):
        (tmp_path / name).unlink()
    (tmp_path / "folder.txt").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_path(pattern) == read_path(tmp_path / pattern) == list(expected)
    assert read_path(".h*.txt") == ["hidden"]


def test_a_name_that_looks_like_a_pattern_is_that_file(tmp_path):
    write_file(tmp_path, "x[1].txt", b"one")
    write_file(tmp_path, "x1.txt", b"two")
    (tmp_path / "f[1]").mkdir()
    write_file(tmp_path, "f[1]/x.txt", b"three")
    assert read_path(tmp_path / "x[1].txt") == ["one"]
    assert read_path(tmp_path / "f[1]") == ["three"]


def test_a_file_of_any_name_is_text(tmp_path):
    for name in ("README", "x", "x.py", "x.log.1", "x.gz.txt"):
        assert read_path(write_file(tmp_path, name, b"text")) == ["text"]
    for name in ("README.gz", "x.py.zst", "x.1.GZ"):
        assert read_path(write_file(tmp_path, name, b"text")) == ["text"]


NO_FILE = "is not a file, a folder or a pattern that matches a file"
SUFFIXES = ", ".join(FILE_KINDS)


@pytest.mark.parametrize("path, message", [
    ("nowhere.txt", f"nowhere.txt {NO_FILE}"),
    ("nowhere/*.txt", f"nowhere/*.txt {NO_FILE}"),
    ("empt[y]", f"empt[y] {NO_FILE}"),
    ("empty", f"the folder empty holds no file that ends in {SUFFIXES} (or these with .gz"),
    ("texts", "texts holds both text and token files (.bin); name the files to use, for exam"),
    ("texts/*", "texts/* holds both text and token files (.bin)"),
    ("c.json", "c.json is one JSON value, which would have to be read whole; write one object per"),
    ("[c].*", "c.json is one JSON value"),
    ("d.JSON.gz", "d.JSON.gz is one JSON value"),
    ("e.bin.gz", "e.bin.gz needs random access, which .gz does not allow; decompress it"),
    ("f.parquet.zst", "f.parquet.zst needs random access, which .zst does not allow; decompress"),
])  # fmt: skip
def test_a_path_without_a_file_that_can_be_read_is_refused(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for name in ("texts/a.txt", "texts/b.bin", "c.json", "d.JSON.gz", "e.bin.gz", "f.parquet.zst"):
        write_file(tmp_path, name, b"{}")
    assert refusal(path).startswith(message)
    assert kind_of(open_path("texts/*.bin").files[0]) == "tokens"


def test_a_file_that_has_gone_is_a_user_error(tmp_path):
    source = open_path(write_file(tmp_path, "x.txt", b"a"))
    (tmp_path / "x.txt").unlink()
    with pytest.raises(UserError, match=r"x\.txt cannot be read: .*No such file"):
        documents_of(source)
