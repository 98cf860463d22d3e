"""Dialects of tables: backslashes in CSV, carriage returns for line ends, JSON lines as .json."""

import csv
import json

import pandas
import pytest

from pocketlm.corpus import input_files
from tests.support.sources import SUFFIXES, read_path, refusal, write_file

TEXTS = ['He said "no", slowly', "plain", 'a "quote"', "two\nlines", 'ends with "it"', "a\\b"]


@pytest.mark.parametrize("name, delimiter, quoting", [
    ("x.csv", ",", csv.QUOTE_ALL), ("x.csv", ",", csv.QUOTE_MINIMAL),
    ("x.tsv", "\t", csv.QUOTE_ALL),
])  # fmt: skip
@pytest.mark.parametrize("count", [1, 40])
def test_csv_with_backslashes_is_as_pandas_writes_and_reads_it(
    tmp_path, name, delimiter, quoting, count
):
    options = {"sep": delimiter, "escapechar": "\\", "doublequote": False, "quoting": quoting}
    frame = pandas.DataFrame({"id": range(count * 6), "text": TEXTS * count})
    frame.to_csv(tmp_path / name, index=False, **options)
    assert (
        read_path(tmp_path / name)
        == pandas.read_csv(tmp_path / name, **options)["text"].tolist()
        == TEXTS * count
    )


@pytest.mark.parametrize("text", ['C:\\"', "a\\", '\\"', '"\\', "\\n", '\\""'])
def test_backslashes_of_usual_csv_are_text(tmp_path, text):
    frame = pandas.DataFrame({"text": ["first", text, "last"], "n": [1, 2, 3]})
    frame.to_csv(tmp_path / "x.csv", index=False)
    assert read_path(tmp_path / "x.csv") == ["first", text, "last"]


def test_the_last_row_of_the_start_of_a_table_may_be_cut_off(tmp_path, monkeypatch):
    path = write_file(tmp_path, "x.csv", b'text\n"a \\"b\\" c"\n"a text that is cut off here"\n')
    for size in range(19, 48):
        monkeypatch.setattr(input_files.first_text, "__defaults__", (size,))
        assert read_path(path) == ['a "b" c', "a text that is cut off here"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name, raw", [
    ("x.csv", b'id,text\r1,one\r2,"two, too"\r'), ("x.tsv", b"text\tid\rone\t1\rtwo, too\t2"),
    ("x.jsonl", b'{"text": "one"}\r{"text": "two, too"}\r'),
])  # fmt: skip
def test_lines_may_end_in_carriage_returns(tmp_path, name, raw, suffix):
    assert read_path(write_file(tmp_path, name + suffix, raw)) == ["one", "two, too"]


def test_a_carriage_return_in_a_table_with_line_feeds_ends_no_line(tmp_path):
    path = write_file(tmp_path, "x.csv", b'text,n\n"one\rtwo",1\nthree,2\n')
    assert read_path(path) == ["one\rtwo", "three"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_json_lines_may_be_in_a_json_file(tmp_path, suffix):
    rows = [{"text": text, "n": 1} for text in TEXTS]
    for end in ("\n", "\r\n", "\n\n"):
        raw = "".join(json.dumps(row) + end for row in rows).encode()
        assert read_path(write_file(tmp_path, f"x.json{suffix}", raw)) == TEXTS


@pytest.mark.parametrize("value", [[{"text": "a"}], {"text": "a"}, {"data": [{"text": "a"}]}])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_json_value_is_refused_with_the_remedy(tmp_path, value, indent):
    path = write_file(tmp_path, "x.json", json.dumps(value, indent=indent).encode())
    assert refusal(path) == (
        f"{path} is one JSON value, which would have to be read whole; "
        f"write one object per line, as .jsonl, for example with jq -c '.[]' {path}"
    )
