"""Tables to documents: JSON lines, CSV and parquet."""

import csv
import io
import itertools
import json
import re

import pandas
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

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

# ---- jsonl ----

BYTE_ORDER_MARK = "\ufeff"
STORAGE = st.tuples(st.sampled_from(["", BYTE_ORDER_MARK]), st.sampled_from(SUFFIXES))
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ['"', "\\", "a\nb", "a\r\nb", "\u2028", "\x85", "\0", "\ufeff", "x" * 300]
)


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.none() | ANY, min_size=1, max_size=8),
    ascii=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]),
    last=st.booleans(),
    storage=STORAGE,
    size=st.integers(1, 50),
)
def test_the_documents_of_jsonl_are_the_fields_that_were_written(
    folder, texts, ascii, end, last, storage, size
):
    mark, suffix = storage
    lines = [
        json.dumps({"id": i, "the text": text, "text": {"text": 1}}, ensure_ascii=ascii)
        for i, text in enumerate(texts)
    ]
    text = mark + end.join(lines) + end * last
    path = write_file(folder, f"x.jsonl{suffix}", text.encode(), (9,))
    with small_pieces(size):
        assert read_path(path, text_field="the text") == not_blank(texts)


def test_jsonl_is_as_pandas_reads_it(tmp_path):
    frame = pandas.DataFrame({"text": ["a", "b\nc", "é😀", "d\u2028e"], "n": [1, 2, 3, 4]})
    frame.to_json(tmp_path / "x.ndjson.gz", orient="records", lines=True)
    assert (
        read_path(tmp_path / "x.ndjson.gz")
        == pandas.read_json(tmp_path / "x.ndjson.gz", lines=True)["text"].tolist()
        == frame["text"].tolist()
    )


PAIRS = [  # two halves, and the character that JSON reads them as
    ("\ud83d\ude00", "😀"),
    ("\ud800\ude00", "\U00010200"),
    ("\ud800\udfff", "\U000103ff"),
    ("\ud83d\udfff", "\U0001f7ff"),
]
HALVES = st.lists(
    st.sampled_from(["a", "😀", "\ud83d", "\ude00", "\ud800", "\udfff", "\ufeff", "\ufffd"]),
    min_size=1,
    max_size=8,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(HALVES)
def test_half_of_a_surrogate_pair_is_refused_by_its_line_or_replaced(folder, text):
    line = json.dumps({"text": text})
    path = write_file(folder, "x.jsonl", f'{{"text": "fine"}}\n\n{line}\n'.encode())
    joined = text
    for pair, character in PAIRS:
        joined = joined.replace(pair, character)
    replaced = re.sub("[\ud800-\udfff]", "\ufffd", joined)
    assert read_path(path, errors="replace") == ["fine", replaced]
    if half := re.search("[\ud800-\udfff]", joined):
        character = f"character {half.start()} of 'text'"
        message = f"{path}:3: {character} is half of a surrogate pair; data.errors=replace"
        assert refusal(path).startswith(message)
    else:
        assert read_path(path) == ["fine", joined]


GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize("line, message", [
    ('{"text": "a"', "not JSON: Expecting ',' delimiter"),
    ("text", "not JSON: Expecting value"),
    ('{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    ('"text"', "a line is a JSON object with a field 'text', not '\"text\"'"),
    ('["text"]', "a line is a JSON object"),
    ("null", "a line is a JSON object"),
    ('{"body": "a", "url": "b"}', "has no field 'text'; it has body, url: set data.text_field"),
    ("{}", "has no field 'text'; it has none"),
    ('{"text": 7}', "the field 'text' holds int '7', not text; set data.text_field"),
    ('{"text": ["a"]}', "the field 'text' holds list \"['a']\", not text"),
    ('{"text": false}', "the field 'text' holds bool 'False', not text"),
    ("[" * 100_000, "not JSON: maximum recursion depth exceeded"),
    ('{"n": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
])  # fmt: skip
def test_a_line_that_is_not_a_row_is_named(tmp_path, line, message):
    path = write_file(tmp_path, "x.jsonl", f"{GOOD}\n{GOOD}{line}\n{GOOD}".encode())
    error = refusal(path)
    assert error.startswith(f"{path}:4")
    assert message in error
    assert len(error) < 400


# ---- csv and tsv ----


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(ANY | st.sampled_from([",", "\t", '""', "a,b", "a\tb", "'", "\r"]), max_size=8),
    kind=st.sampled_from(["csv", "tsv"]),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    storage=STORAGE,
    size=st.integers(1, 50),
)
def test_the_documents_of_csv_are_the_fields_that_were_written(
    folder, texts, kind, end, quoting, storage, size
):
    mark, suffix = storage
    sink = io.StringIO(newline="")
    if "\r" in "".join(texts):  # which Python's writer does not quote otherwise
        quoting = csv.QUOTE_ALL
    delimiter = "," if kind == "csv" else "\t"
    writer = csv.writer(sink, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(["id", "the text", "else"])
    writer.writerows([i, text, "x"] for i, text in enumerate(texts))
    raw = (mark + sink.getvalue()).encode()
    path = write_file(folder, f"x.{kind}{suffix}", raw, (5,))
    with small_pieces(size):
        assert read_path(path, text_field="the text") == not_blank(texts)


@pytest.mark.parametrize(
    "name, separator", [("x.csv", ","), ("x.TSV", "\t"), ("x.tsv.old.csv", ",")]
)
def test_csv_is_as_pandas_writes_and_reads_it(tmp_path, name, separator):
    texts = ["plain", "a,b", "a\tb", "two\nlines", "windows\r\nlines", 'a "quote"']
    texts += ["é😀", "", "  spaces ", "NA", "1.50"]
    pandas.DataFrame({"id": range(len(texts)), "text": texts}).to_csv(
        tmp_path / name, sep=separator, index=False
    )
    frame = pandas.read_csv(tmp_path / name, sep=separator, dtype=str, keep_default_na=False)
    assert read_path(tmp_path / name) == not_blank(frame["text"].tolist()) == not_blank(texts)


def test_a_field_of_megabytes_and_its_neighbours(tmp_path):
    texts = ["a", "x,\n" * 1_000_000, "b", "y" * 131_073]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    assert read_path(tmp_path / "x.csv") == texts
    # The limit on the length of a field is one for the process: neither reader lowers it.
    one, other = (open_path(tmp_path / "x.csv").pieces() for _ in range(2))
    assert next(one) == next(other) == ("a", True)
    assert "".join(text for text, _ in one) == "".join(texts[1:])
    assert "".join(text for text, _ in other) == "".join(texts[1:])


def test_empty_lines_and_empty_fields_are_no_documents(tmp_path):
    path = write_file(tmp_path, "x.csv", b'text,n\n\na,1\n\n"",2\n,3\nb\n')
    assert read_path(path) == ["a", "b"]


def test_only_the_first_byte_order_mark_of_a_table_is_not_text(tmp_path):
    path = write_file(tmp_path, "x.csv", "\ufefftext\n\ufeffa\n".encode())
    assert read_path(path) == ["\ufeffa"]


@pytest.mark.parametrize("raw, line, message", [
    (b"", None, "has no field 'text'; it has none: set data.text_field"),
    (b"body,url\na,b\n", None, "has no field 'text'; it has body, url: set data.text_field"),
    (b"id,text\n1,a\n2\n", 3, "a row of 1 fields under a header of 2, in which 'text' is number 2"),
    (b'id,text\n1,"a\n\nb"\n2,a, b\n', 5, "a row of 3 fields under a header of 2"),
    (b'text\n"a" b\n', 2, "not CSV: ',' expected after '\"'"),
    (b'text\na\n"b\nc\n', 4, "not CSV: unexpected end of data"),
])  # fmt: skip
def test_a_row_that_is_not_csv_is_named(tmp_path, raw, line, message):
    path = write_file(tmp_path, "x.csv", raw)
    assert refusal(path).startswith(f"{path}:{line}: {message}" if line else f"{path} {message}")


# ---- parquet ----


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.none() | ANY, max_size=12),
    kind=st.sampled_from(
        [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
    ),
    group=st.integers(1, 12),
    codec=st.sampled_from(["none", "snappy", "zstd"]),
    size=st.integers(1, 30),
)
def test_the_documents_of_parquet_are_the_column_that_was_written(
    folder, texts, kind, group, codec, size
):
    values = [text and text.encode() for text in texts] if kind == pa.binary() else texts
    column = pa.array(values, kind)
    table = pa.table(
        {
            "id": range(len(texts)),
            "text.more": ["z"] * len(texts),
            "meta": [{"text": "m"}] * len(texts),
            "text": column,
        }
    )
    parquet.write_table(table, folder / "x.parquet", row_group_size=group, compression=codec)
    with small_pieces(size):
        assert read_path(folder / "x.parquet") == not_blank(texts)
    assert parquet.read_table(folder / "x.parquet")["id"].to_pylist() == list(range(len(texts)))


def test_a_column_is_found_by_its_name_alone(tmp_path):
    """To the library, `a.b` is also the field b of column a, and two columns may have one name."""
    columns = {"a": [{"b": "wrong"}], "a.b": ["right"], "a.b.c": ["wrong"]}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert read_path(tmp_path / "x.parquet", text_field="a.b") == ["right"]
    twice = pa.Table.from_arrays(
        [pa.array([text]) for text in ("other", "first", "second")], names=["n", "text", "text"]
    )
    parquet.write_table(twice, tmp_path / "x.parquet")
    assert read_path(tmp_path / "x.parquet") == ["first"]


def test_a_table_without_rows_has_no_documents_and_is_read_to_its_end(tmp_path):
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "x.parquet")
    source = open_path(tmp_path / "x.parquet")
    assert documents_of(source) == []
    assert source.position == source.size > 0


def invalid_strings(*values: bytes) -> pa.Array:
    """Return a column of strings without checking that they are UTF-8."""
    offsets = pa.array([0, *itertools.accumulate(map(len, values))], pa.int32()).buffers()[1]
    return pa.Array.from_buffers(
        pa.string(), len(values), [None, offsets, pa.py_buffer(b"".join(values))]
    )


def test_wrong_bytes_in_parquet_are_refused_by_their_row_or_replaced(tmp_path):
    values = [b"fine"] * 250 + [b"ab\xffc", b"fine"]
    parquet.write_table(pa.table({"text": invalid_strings(*values)}), tmp_path / "x.parquet")
    path = tmp_path / "x.parquet"
    assert refusal(path) == (
        f"row 250 of {path} is not UTF-8: byte 2 is 0xff; "
        "data.errors=replace reads such bytes as U+FFFD, and a text in another encoding is "
        "converted with iconv -f ENCODING -t UTF-8"
    )
    replaced = ["fine"] * 250 + ["ab\ufffdc", "fine"]
    assert read_path(path, errors="replace") == replaced


@pytest.mark.parametrize("column, message", [
    ({"body": ["a"], "url": ["b"]}, "x.parquet has no field 'text'; it has body, url: set data."),
    ({"text": [7]}, "x.parquet: the field 'text' holds int '7', not text; set data.text_field"),
    ({"text": [["a", "b"]]}, "x.parquet: the field 'text' holds list"),
    ({"text": [{"en": "a"}]}, "x.parquet: the field 'text' holds dict"),
])  # fmt: skip
def test_a_table_without_a_column_of_text_says_what_it_has(tmp_path, column, message):
    parquet.write_table(pa.table(column), tmp_path / "x.parquet")
    assert message in refusal(tmp_path / "x.parquet")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "changed"])
def test_parquet_that_cannot_be_read_is_a_user_error_that_names_it(tmp_path, damage):
    path = tmp_path / "x.parquet"
    table = pa.table({"text": [f"{i}" * 9 for i in range(5000)]})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    raw = path.read_bytes()
    damaged = {
        "truncated": raw[: len(raw) // 2],
        "empty": b"",
        "text": b"text\n" * 100,
        "changed": raw[:100] + bytes(1000) + raw[1100:],
    }
    path.write_bytes(damaged[damage])
    assert refusal(path).startswith(f"{path} is not a parquet file that can be read: ")
