"""Documents out of every kind of source, against independent readings of the same bytes, whatever the blocks they come in."""

import csv
import gzip
import io
import itertools
import json
import pickle
import random
import re
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pandas
import psutil
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pocketlm.config.sections import DataConfig, SourceConfig
from pocketlm.corpus import pieces, readers, sources
from pocketlm.corpus.named import CORPORA
from pocketlm.corpus.pieces import Source
from pocketlm.corpus.readers import FileSource, kind_of
from pocketlm.corpus.sources import NamedSource, RowsSource, open_source
from pocketlm.errors import UserError

DATA = Path(__file__).parents[2] / "data"
PIECE = pieces.PIECE


@contextmanager
def pieces_of(size: int, rows: int | None = None) -> Iterator[None]:
    """Pieces and blocks of so many characters, and tables of as many rows, so that short texts have many borders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", size)
        patch.setattr(readers, "BLOCK", size)
        patch.setattr(readers, "ROWS", rows or size)
        yield


def documents(source: Source) -> list[str]:
    """The documents of a source, whose pieces are full but for the last of each."""
    whole, held = [], []
    for text, ends in source.pieces():
        assert 0 < len(text) <= pieces.PIECE
        assert ends or len(text) == pieces.PIECE
        held.append(text)
        if ends:
            whole.append("".join(held))
            held = []
    assert held == []
    return whole


def opened(path: Path | str, **keys: object) -> Source:
    return open_source(SourceConfig(path=str(path), **keys), "no data folder is needed")


def read(path: Path | str, **keys: object) -> list[str]:
    return documents(opened(path, **keys))


def inked(texts: list[str | None]) -> list[str]:
    """Those that are not blank."""
    return [text for text in texts if text and text.strip()]


def refusal(path: Path | str, **keys: object) -> str:
    """The one line that a source is refused with."""
    with pytest.raises(UserError) as error:
        read(path, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A place to write into, again and again."""
    return tmp_path_factory.mktemp("sources")


# ---- compression -----------------------------------------------------------------------------------------------------


def zstandard(raw: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard}


def write(folder: Path, name: str, raw: bytes, cuts: tuple[int, ...] = ()) -> Path:
    """The bytes as the name says, compressed in several members or frames, cut at `cuts`."""
    path = folder / name
    borders = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    parts = [raw[a:b] for a, b in itertools.pairwise(borders)]
    path.write_bytes(
        b"".join(map(PACK[path.suffix.lower() if path.suffix.lower() in PACK else ""], parts))
    )
    return path


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("size", [0, 1, 1000, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_a_file_is_one_document_byte_for_byte(tmp_path, suffix, size):
    raw = ("é\r\n\0a" * size)[:size].encode()
    path = write(tmp_path, f"x.txt{suffix}", raw, (7, 7, size // 2))
    assert [text.encode() for text in read(path)] == [raw] * bool(raw)


def test_a_byte_order_mark_is_text_in_a_text_file(tmp_path):
    assert read(write(tmp_path, "x.txt", b"\xef\xbb\xbfa\r\nb\r\n")) == ["\ufeffa\r\nb\r\n"]
    assert read(write(tmp_path, "x.txt", b"\xef\xbb\xbfa\r\nb\r\n"), separator="line") == [
        "\ufeffa",
        "b",
    ]


def test_zstandard_frames_that_are_skipped_are(tmp_path):
    """pzstd writes such a frame before each of its others."""
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00size"
    (tmp_path / "x.txt.zst").write_bytes(
        skipped + zstandard(b"one ") + skipped + zstandard(b"") + zstandard(b"two")
    )
    assert read(tmp_path / "x.txt.zst") == ["one two"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_a_truncated_file_is_a_user_error_that_names_it(tmp_path, suffix, kept):
    path = write(tmp_path, f"x.txt{suffix}", bytes(range(128)) * 100_000)
    raw = path.read_bytes()
    path.write_bytes(raw[: max(5, int(len(raw) * kept))])
    assert refusal(path).startswith(f"{path} cannot be read: ")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["not compressed", "changed", "something behind"])
def test_a_damaged_file_is_a_user_error_that_names_it(tmp_path, suffix, damage):
    raw = PACK[suffix](b"the cat sat on the mat, the dog on the log" * 50)
    changed = raw[:10] + b"\xff" * 8 + raw[18:]
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(
        {"not compressed": b"plain text", "changed": changed, "something behind": raw + b"behind"}[
            damage
        ]
    )
    assert refusal(path).startswith(f"{path} cannot be read: ")


# ---- text files ------------------------------------------------------------------------------------------------------


def split_as(text: str, separator: str | None) -> list[str]:
    """The documents of a whole text."""
    if separator is None:
        return [text]
    if separator == "line":
        return [line.removesuffix("\r") for line in text.split("\n")]
    if separator == "blank_line":
        groups = itertools.groupby(text.split("\n"), key=lambda line: bool(line.strip()))
        return ["\n".join(lines).removesuffix("\r") for inky, lines in groups if inky]
    return text.split(separator)


SEPARATORS = [
    None,
    "line",
    "blank_line",
    "<>",
    "<><>",
    "<>a<>",
    "aa",
    "\n\n",
    "\n",
    "\r\n",
    "😀",
    "é<",
    " ",
    "\0",
    "a" * 9,
]
PARTS = [
    "a",
    "b",
    "aa",
    "<",
    ">",
    "<>",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\t",
    "é",
    "😀",
    "\0",
    "\ufeff",
    "\u2028",
    "\x85",
    "\x0b",
]
TEXT = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=40).map("".join)


@settings(max_examples=600, deadline=None)
@given(
    text=TEXT,
    separator=st.sampled_from(SEPARATORS)
    | st.text(min_size=1, max_size=4).filter(lambda s: s not in ("line", "blank_line")),
    size=st.integers(1, 12) | st.just(100),
    suffix=st.sampled_from([*PACK]),
    cuts=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_the_documents_of_a_text_are_those_of_splitting_it_whole(
    folder, text, separator, size, suffix, cuts
):
    path = write(folder, f"x.txt{suffix}", text.encode(), cuts)
    with pieces_of(size):
        assert read(path, separator=separator) == inked(split_as(text, separator))


@settings(max_examples=600, deadline=None)
@given(
    text=st.text(alphabet="a\r\n ", max_size=14),
    separator=st.sampled_from(["line", "blank_line"]),
    size=st.integers(1, 4),
)
def test_the_ends_of_lines_are_those_of_the_whole_text(folder, text, separator, size):
    path = write(folder, "x.txt", text.encode())
    with pieces_of(size):
        assert read(path, separator=separator) == inked(split_as(text, separator))


def test_lines_as_windows_ends_them(tmp_path):
    path = write(tmp_path, "x.txt", b"a\r\nb\r\n\r\nc\rd\r\n")
    assert read(path, separator="line") == ["a", "b", "c\rd"]
    assert read(path, separator="blank_line") == ["a\r\nb", "c\rd"]
    assert read(path) == ["a\r\nb\r\n\r\nc\rd\r\n"]


@pytest.mark.parametrize("separator", ["<|endoftext|>", "line", "blank_line"])
@pytest.mark.parametrize("offset", range(-16, 3))
def test_a_separator_over_the_border_of_two_blocks_separates(tmp_path, separator, offset):
    """With blocks of the real size."""
    end = {"line": "\n", "blank_line": "\r\n \r\n"}.get(separator, separator)
    long, short = "x" * (PIECE + offset), "é" * 1000
    path = write(tmp_path, "x.txt", f"{long}{end}{short}{end}{long}".encode())
    assert read(path, separator=separator) == [long, short, long]


def test_equal_documents_have_equal_pieces_wherever_they_stand(folder):
    """The first piece decides on which side of the split a document is."""
    text = "abcdefghij" * 3
    for before in range(25):
        path = write(folder, "x.txt", f"{'y' * before}<>{text}<>{text}".encode())
        with pieces_of(7):
            pieces = [*opened(path, separator="<>").pieces()]
        assert pieces[-5:] == [
            ("abcdefg", False),
            ("hijabcd", False),
            ("efghija", False),
            ("bcdefgh", False),
            ("ij", True),
        ]
        assert pieces[-10:-5] == pieces[-5:]


def test_the_pieces_of_whole_documents_are_those_of_a_file(folder):
    class Whole(Source):
        def documents(self) -> Iterator[str]:
            yield from texts

    texts = ["a" * 20, " " * 30, "", " " * 16 + "b", "c" * 8, "d" * 8 + " " * 9]
    path = write(folder, "x.txt", "<>".join(texts).encode())
    with pieces_of(8):
        assert [*Whole().pieces()] == [*opened(path, separator="<>").pieces()]
        assert documents(Whole()) == inked(texts)


def test_a_separator_ends_with_its_file(tmp_path):
    for name, text in (
        ("a.txt", "one\ntwo"),
        ("b.txt", "three\n"),
        ("c.txt", "\n \n"),
        ("d.txt", "four"),
    ):
        (tmp_path / name).write_text(text)
    assert read(tmp_path, separator="line") == ["one", "two", "three", "four"]
    assert read(tmp_path) == ["one\ntwo", "three\n", "four"]


# ---- bytes that are not UTF-8 ----------------------------------------------------------------------------------------

WHOLE, BROKEN = (
    ["a", "\n", "é", "€", "😀"],
    [b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xff", b"\x80", b"\xed\xa0\x80"],
)
BYTES = st.lists(
    st.sampled_from([*map(str.encode, WHOLE), *BROKEN]) | st.binary(max_size=3), max_size=15
).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(raw=BYTES, size=st.integers(1, 9), suffix=st.sampled_from([*PACK]))
def test_bytes_that_are_not_utf_8_are_found_or_replaced_as_in_the_whole(folder, raw, size, suffix):
    path = write(folder, f"x.txt{suffix}", raw, (4,))
    with pieces_of(size):
        assert read(path, errors="replace") == inked([raw.decode(errors="replace")])
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            expected = f"{path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}; data.errors=replace puts U+FFFD in such places"
            assert refusal(path) == expected
            assert refusal(path, separator="line") == expected
        else:
            assert read(path) == inked([text])


@pytest.mark.parametrize("before", [0, 1, PIECE - 2, PIECE - 1, PIECE, PIECE + 1, 5_000_001])
@pytest.mark.parametrize("wrong", [b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98"])
@pytest.mark.parametrize("after", [b"", b"behind"])
def test_the_number_of_a_wrong_byte_is_right_at_block_borders_and_at_the_end(
    tmp_path, before, wrong, after
):
    path = write(tmp_path, "x.txt", b"x" * before + wrong + after)
    assert f"byte {before} is 0x{wrong[0]:02x}" in refusal(path)
    assert read(path, errors="replace") == ["x" * before + "\ufffd" + after.decode()]


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv"])
def test_wrong_bytes_in_a_table_are_refused_or_replaced(tmp_path, name):
    raw = {"x.jsonl": b'{"text": "a"}\n{"text": "b\xe9c"}\n'}.get(name, b'text\na\n"b\xe9c"\n')
    assert f"byte {raw.index(0xE9)} is 0xe9" in refusal(write(tmp_path, name, raw))
    assert read(tmp_path / name, errors="replace") == ["a", "b\ufffdc"]


# ---- dialogues -------------------------------------------------------------------------------------------------------

LAYOUT = """\
The kitchen stinks . __eou__ I'll throw out the garbage . __eou__
So Dick , how about getting some coffee for tonight ? __eou__ Coffee ? I don ’ t honestly like that kind of stuff . __eou__ \
Come on , you can at least try a little , besides your cigarette . __eou__

Good luck ! __eou__
  __eou__   Hello ? __eou____eou__ Yes .  Who is it ?\t__eou__ No one __eou__ behind the last sign
"""
TALKS = [
    "A: The kitchen stinks .\nB: I'll throw out the garbage .\n",
    "A: So Dick , how about getting some coffee for tonight ?\nB: Coffee ? I don ’ t honestly like that kind of stuff .\n"
    "A: Come on , you can at least try a little , besides your cigarette .\n",
    "A: Good luck !\n",
    "A: Hello ?\nB: Yes .  Who is it ?\nA: No one\nB: behind the last sign\n",
]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("end", ["\n", "", "\n\n", "\n \n\t\n", "\n __eou__ \n"])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_file_in_dailydialogs_layout_is_a_conversation_a_line(tmp_path, suffix, end, line):
    text = (LAYOUT.removesuffix("\n") + end).replace("\n", line)
    source = opened(write(tmp_path, f"dialogues_text.txt{suffix}", text.encode(), (9, 300)))
    assert source.name == f"{tmp_path}/dialogues_text.txt{suffix} (DailyDialog's layout)"
    assert (
        documents(source)
        == documents(source)
        == documents(pickle.loads(pickle.dumps(source)))
        == TALKS
    )
    assert source.position == source.size


UTTERANCE = (
    st.text(alphabet="ab .é’😀_\t\u2028", min_size=1, max_size=12)
    .map(lambda text: text.strip(" \t\u2028_"))
    .filter(bool)
)


@settings(max_examples=200, deadline=None)
@given(
    talks=st.lists(st.lists(UTTERANCE, max_size=5), max_size=6),
    size=st.integers(1, 40),
    suffix=st.sampled_from([*PACK]),
    mark=st.booleans(),
)
def test_the_documents_of_dialogues_are_the_turns_that_were_written(
    folder, talks, size, suffix, mark
):
    talks = [["first"], *talks]
    text = "\ufeff" * mark + "".join(
        "".join(f"{turn} __eou__ " for turn in talk) + "\n" for talk in talks
    )
    source = opened(write(folder, f"x.txt{suffix}", text.encode(), (5,)))
    expected = [
        "".join(f"{speaker}: {turn}\n" for speaker, turn in zip("ABABA", talk, strict=False))
        for talk in talks
    ]
    with pieces_of(size):
        assert documents(source) == [text for text in expected if text]


def test_a_separator_wins_over_the_layout_of_dialogues(tmp_path):
    path = write(tmp_path, "x.txt", LAYOUT.encode())
    assert read(path, separator="line") == inked(LAYOUT.split("\n"))
    assert read(path, separator="__eou__") == inked(LAYOUT.split("__eou__"))
    assert opened(path, separator="line").name == str(path)


@pytest.mark.parametrize("name, raw", [
    ("x.txt", "No sign in the first line\n" + LAYOUT),
    ("x.txt", "\n" + LAYOUT),
    ("x.txt", "x" * PIECE + LAYOUT),
    ("x.txt", LAYOUT.replace("__eou__", "_eou_")),
    ("x.txt", "3 4 1\n2 2\n"),
    ("x.md", LAYOUT), ("x.txt.old", LAYOUT), ("x", LAYOUT),
])  # fmt: skip
def test_a_file_without_the_layout_of_dialogues_is_one_document(tmp_path, name, raw):
    path = write(tmp_path, name, raw.encode())
    assert read(path) == [raw]
    assert opened(path).name == str(path)


def test_the_sign_of_dialogues_is_looked_for_in_a_megabyte(tmp_path):
    turn = "x" * (PIECE - 8)
    assert read(write(tmp_path, "x.txt", f"{turn} __eou__\n".encode())) == [f"A: {turn}\n"]
    assert read(write(tmp_path, "x.txt", f"x{turn} __eou__\n".encode())) == [f"x{turn} __eou__\n"]


def test_a_folder_of_dialogues_and_other_texts_names_one_of_each(tmp_path, monkeypatch):
    """As DailyDialog's own is, with files of numbers beside."""
    monkeypatch.chdir(tmp_path)
    Path("train").mkdir()
    write(Path("train"), "dialogues_act_train.txt", b"3 4 \n2 2 \n")
    write(Path("train"), "dialogues_emotion_train.txt", b"0 0 \n0 1 \n")
    write(Path("train"), "dialogues_train.txt", LAYOUT.encode())
    said = (
        "train/dialogues_train.txt has DailyDialog's layout, in which __eou__ ends an utterance, "
        "and train/dialogues_act_train.txt has not; name those that are meant, for example train/dialogues_train.txt"
    )
    assert refusal("train") == f"train: {said}"
    assert refusal("train/dialogues_*.txt") == f"train/dialogues_*.txt: {said}"
    assert len(read("train", separator="line")) == 8
    assert read("train/dialogues_train.txt") == TALKS
    assert read("train/dialogues_[ae]*.txt") == ["3 4 \n2 2 \n", "0 0 \n0 1 \n"]


def test_files_of_dialogues_follow_one_another_beside_other_kinds(tmp_path):
    for part in ("train", "validation"):
        (tmp_path / part).mkdir()
        write(tmp_path / part, f"dialogues_{part}.txt", LAYOUT.encode())
    write(tmp_path, "more.txt.gz", b"A sentence . __eou__")
    write(tmp_path, "notes.md", b"Notes on __eou__.")
    write(tmp_path, "rows.jsonl", b'{"text": "A row __eou__"}\n')
    expected = ["A: A sentence .\n", "Notes on __eou__.", "A row __eou__", *TALKS, *TALKS]
    assert read(tmp_path) == expected
    assert opened(tmp_path).name == f"{tmp_path} (DailyDialog's layout)"
    assert read(f"{tmp_path}/*/dialogues_*.txt") == TALKS * 2


def test_dialogues_of_bytes_that_are_not_utf_8_are_refused_or_replaced(tmp_path):
    path = write(tmp_path, "x.txt", b"a __eou__ b\xff __eou__\n")
    assert "byte 11 is 0xff" in refusal(path)
    assert read(path, errors="replace") == ["A: a\nB: b\ufffd\n"]


def test_only_dialogues_have_their_layout_in_the_digest(tmp_path):
    """Which for every other file is what it was before there was this layout."""
    path = write(tmp_path, "x.txt", b"text")
    settings = [1, None, "text", "strict", [("text", None)]]
    assert opened(path).digest() == pieces.hash_files([path], settings)
    talks = write(tmp_path, "talks.txt", LAYOUT.encode())
    copy = write(tmp_path, "talks.md", LAYOUT.encode())
    assert opened(copy).digest() == pieces.hash_files([talks], settings)
    assert opened(talks).digest() != opened(copy).digest()
    assert opened(talks, separator="line").digest() == opened(copy, separator="line").digest()


# ---- jsonl -----------------------------------------------------------------------------------------------------------

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ['"', "\\", "a\nb", "a\r\nb", "\u2028", "\x85", "\0", "\ufeff", "x" * 300]
)


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.none() | ANY, min_size=1, max_size=8),
    ascii=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]),
    last=st.booleans(),
    mark=st.booleans(),
    suffix=st.sampled_from([*PACK]),
    size=st.integers(1, 50),
)
def test_the_documents_of_jsonl_are_the_fields_that_were_written(
    folder, texts, ascii, end, last, mark, suffix, size
):
    lines = [
        json.dumps({"id": i, "the text": text, "text": {"text": 1}}, ensure_ascii=ascii)
        for i, text in enumerate(texts)
    ]
    text = "\ufeff" * mark + end.join(lines) + end * last
    path = write(folder, f"x.jsonl{suffix}", text.encode(), (9,))
    with pieces_of(size):
        assert read(path, text_field="the text") == inked(texts)


def test_jsonl_is_as_pandas_reads_it(tmp_path):
    frame = pandas.DataFrame({"text": ["a", "b\nc", "é😀", "d\u2028e"], "n": [1, 2, 3, 4]})
    frame.to_json(tmp_path / "x.ndjson.gz", orient="records", lines=True)
    assert (
        read(tmp_path / "x.ndjson.gz")
        == pandas.read_json(tmp_path / "x.ndjson.gz", lines=True)["text"].tolist()
        == frame["text"].tolist()
    )


HALVES = st.lists(
    st.sampled_from(["a", "😀", "\ud83d", "\ude00", "\ud800", "\udfff", "\ufeff", "\ufffd"]),
    min_size=1,
    max_size=8,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(HALVES)
def test_half_a_character_is_refused_by_its_line_or_replaced(folder, text):
    path = write(
        folder, "x.jsonl", f'{{"text": "fine"}}\n\n{json.dumps({"text": text})}\n'.encode()
    )
    joined = (
        text.replace("\ud83d\ude00", "😀")
        .replace("\ud800\ude00", "\U00010200")
        .replace("\ud800\udfff", "\U000103ff")
    )
    joined = joined.replace("\ud83d\udfff", "\U0001f7ff")  # as JSON reads two halves
    assert read(path, errors="replace") == ["fine", re.sub("[\ud800-\udfff]", "\ufffd", joined)]
    if lone := re.search("[\ud800-\udfff]", joined):
        assert refusal(path).startswith(
            f"{path}:3: character {lone.start()} of 'text' is half a one; data.errors=replace"
        )
    else:
        assert read(path) == ["fine", joined]


GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize("line, said", [
    ('{"text": "a"', "not JSON: Expecting ',' delimiter"),
    ("text", "not JSON: Expecting value"),
    ('{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    ('"text"', "a line is a JSON object with a field 'text', not '\"text\"'"),
    ('["text"]', "a line is a JSON object"),
    ("null", "a line is a JSON object"),
    ('{"body": "a", "url": "b"}', "has no field 'text'; there are body, url: set data.text_field"),
    ("{}", "has no field 'text'; there are none"),
    ('{"text": 7}', "the field 'text' holds int '7', not text; set data.text_field"),
    ('{"text": ["a"]}', "the field 'text' holds list \"['a']\", not text"),
    ('{"text": false}', "the field 'text' holds bool 'False', not text"),
    ("[" * 100_000, "not JSON: maximum recursion depth exceeded"),
    ('{"n": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
])  # fmt: skip
def test_a_line_that_is_no_row_is_named(tmp_path, line, said):
    path = write(tmp_path, "x.jsonl", f"{GOOD}\n{GOOD}{line}\n{GOOD}".encode())
    message = refusal(path)
    assert message.startswith(f"{path}:4")
    assert said in message
    assert len(message) < 400


# ---- csv and tsv -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(ANY | st.sampled_from([",", "\t", '""', "a,b", "a\tb", "'", "\r"]), max_size=8),
    kind=st.sampled_from(["csv", "tsv"]),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    mark=st.booleans(),
    suffix=st.sampled_from([*PACK]),
    size=st.integers(1, 50),
)
def test_the_documents_of_csv_are_the_fields_that_were_written(
    folder, texts, kind, end, quoting, mark, suffix, size
):
    sink = io.StringIO(newline="")
    if "\r" in "".join(texts):  # which Python's writer leaves bare
        quoting = csv.QUOTE_ALL
    writer = csv.writer(
        sink, delimiter="," if kind == "csv" else "\t", lineterminator=end, quoting=quoting
    )
    writer.writerows(
        [["id", "the text", "else"], *([i, text, "x"] for i, text in enumerate(texts))]
    )
    path = write(folder, f"x.{kind}{suffix}", ("\ufeff" * mark + sink.getvalue()).encode(), (5,))
    with pieces_of(size):
        assert read(path, text_field="the text") == inked(texts)


@pytest.mark.parametrize(
    "name, separator", [("x.csv", ","), ("x.TSV", "\t"), ("x.tsv.old.csv", ",")]
)
def test_csv_is_as_pandas_writes_and_reads_it(tmp_path, name, separator):
    texts = [
        "plain",
        "a,b",
        "a\tb",
        "two\nlines",
        "windows\r\nlines",
        'a "quote"',
        "é😀",
        "",
        "  spaces ",
        "NA",
        "1.50",
    ]
    pandas.DataFrame({"id": range(len(texts)), "text": texts}).to_csv(
        tmp_path / name, sep=separator, index=False
    )
    frame = pandas.read_csv(tmp_path / name, sep=separator, dtype=str, keep_default_na=False)
    assert read(tmp_path / name) == inked(frame["text"].tolist()) == inked(texts)


def test_a_field_of_megabytes_and_its_neighbours(tmp_path):
    texts = ["a", "x,\n" * 1_000_000, "b", "y" * 131_073]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    assert read(tmp_path / "x.csv") == texts
    one, other = (
        opened(tmp_path / "x.csv").pieces() for _ in range(2)
    )  # neither lowers the limit of the other
    assert next(one) == next(other) == ("a", True)
    assert "".join(text for text, _ in one) == "".join(texts[1:])
    assert "".join(text for text, _ in other) == "".join(texts[1:])


def test_empty_lines_and_empty_fields_are_no_documents(tmp_path):
    assert read(write(tmp_path, "x.csv", b'text,n\n\na,1\n\n"",2\n,3\nb\n')) == ["a", "b"]


def test_only_the_first_byte_order_mark_of_a_table_is_none_of_its_text(tmp_path):
    assert read(write(tmp_path, "x.csv", "\ufefftext\n\ufeffa\n".encode())) == ["\ufeffa"]


@pytest.mark.parametrize("raw, line, said", [
    (b"", None, "has no field 'text'; there are none: set data.text_field"),
    (b"body,url\na,b\n", None, "has no field 'text'; there are body, url: set data.text_field"),
    (b"id,text\n1,a\n2\n", 3, "a row of 1 fields under a header of 2, of which 'text' is number 2"),
    (b'id,text\n1,"a\n\nb"\n2,a, b\n', 5, "a row of 3 fields under a header of 2"),
    (b'text\n"a" b\n', 2, "not CSV: ',' expected after '\"'"),
    (b'text\na\n"b\nc\n', 4, "not CSV: unexpected end of data"),
])  # fmt: skip
def test_a_row_that_is_not_csv_is_named(tmp_path, raw, line, said):
    path = write(tmp_path, "x.csv", raw)
    assert refusal(path).startswith(f"{path}:{line}: {said}" if line else f"{path} {said}")


# ---- parquet ---------------------------------------------------------------------------------------------------------


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
    column = (
        pa.array([text and text.encode() for text in texts], kind)
        if kind == pa.binary()
        else pa.array(texts, kind)
    )
    table = pa.table(
        {
            "id": range(len(texts)),
            "text.more": ["z"] * len(texts),
            "meta": [{"text": "m"}] * len(texts),
            "text": column,
        }
    )
    parquet.write_table(table, folder / "x.parquet", row_group_size=group, compression=codec)
    with pieces_of(size):
        assert read(folder / "x.parquet") == inked(texts)
    assert parquet.read_table(folder / "x.parquet")["id"].to_pylist() == [*range(len(texts))]


def test_a_column_is_found_by_its_name_alone(tmp_path):
    """To the library, `a.b` is also the field b of the column a; and a name may stand there twice."""
    columns = {"a": [{"b": "wrong"}], "a.b": ["right"], "a.b.c": ["wrong"]}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", text_field="a.b") == ["right"]
    twice = pa.Table.from_arrays(
        [pa.array([text]) for text in ("other", "first", "second")], names=["n", "text", "text"]
    )
    parquet.write_table(twice, tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == ["first"]


def test_a_table_without_rows_has_no_documents_and_is_read_to_its_end(tmp_path):
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "x.parquet")
    source = opened(tmp_path / "x.parquet")
    assert documents(source) == []
    assert source.position == source.size > 0


def invalid_strings(*values: bytes) -> pa.Array:
    """A column of strings that no writer has checked."""
    offsets = pa.array([0, *itertools.accumulate(map(len, values))], pa.int32()).buffers()[1]
    return pa.Array.from_buffers(
        pa.string(), len(values), [None, offsets, pa.py_buffer(b"".join(values))]
    )


def test_wrong_bytes_in_parquet_are_refused_by_their_row_or_replaced(tmp_path):
    values = [b"fine"] * 250 + [b"ab\xffc", b"fine"]
    parquet.write_table(pa.table({"text": invalid_strings(*values)}), tmp_path / "x.parquet")
    said = f"row 250 of {tmp_path / 'x.parquet'} is not UTF-8: byte 2 is 0xff; data.errors=replace puts U+FFFD in such places"
    assert refusal(tmp_path / "x.parquet") == said
    assert read(tmp_path / "x.parquet", errors="replace") == ["fine"] * 250 + ["ab\ufffdc", "fine"]


@pytest.mark.parametrize("column, said", [
    ({"body": ["a"], "url": ["b"]}, "x.parquet has no field 'text'; there are body, url: set data.text_field"),
    ({"text": [7]}, "x.parquet: the field 'text' holds int '7', not text; set data.text_field"),
    ({"text": [["a", "b"]]}, "x.parquet: the field 'text' holds list"),
    ({"text": [{"en": "a"}]}, "x.parquet: the field 'text' holds dict"),
])  # fmt: skip
def test_a_table_without_a_column_of_text_says_what_it_has(tmp_path, column, said):
    parquet.write_table(pa.table(column), tmp_path / "x.parquet")
    assert said in refusal(tmp_path / "x.parquet")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "changed"])
def test_parquet_that_cannot_be_read_is_a_user_error_that_names_it(tmp_path, damage):
    path = tmp_path / "x.parquet"
    parquet.write_table(
        pa.table({"text": [f"{i}" * 9 for i in range(5000)]}),
        path,
        compression="zstd",
        use_dictionary=False,
    )
    raw = path.read_bytes()
    changed = raw[:100] + bytes(1000) + raw[1100:]
    path.write_bytes(
        {
            "truncated": raw[: len(raw) // 2],
            "empty": b"",
            "text": b"text\n" * 100,
            "changed": changed,
        }[damage]
    )
    assert refusal(path).startswith(f"{path} is not a parquet file that can be read: ")


# ---- folders and patterns --------------------------------------------------------------------------------------------


def mixed(folder: Path) -> None:
    """A folder of every kind, with what is no text beside it. The documents are the letters in the order of the names."""
    (folder / "k" / "deep").mkdir(parents=True)
    for hidden in (".git", "k/.ipynb_checkpoints"):
        (folder / hidden).mkdir()
        (folder / hidden / "x.txt").write_text("hidden")
    for name in (".hidden.txt", "k/.x.jsonl"):
        (folder / name).write_text("hidden")
    for name in ("README", "picture.png", "dataset_info.json", "a.txt.bz2", "k/x.arrow", ".gz"):
        (folder / name).write_bytes(b"\xff no text")
    write(folder, "B.txt", b"A")
    write(folder, "a.md", b"B")
    write(folder, "c.csv", b"text\nC\n")
    write(folder, "d.jsonl.gz", b'{"text": "D"}\n')
    write(folder, "e.ndjson", b'{"text": "E"}')
    parquet.write_table(pa.table({"text": ["F"]}), folder / "f.parquet")
    write(folder, "k/deep/g.TXT.ZST", b"G")
    write(folder, "k/h.tsv", b"text\tn\nH\t1\n")
    write(folder, "z.txt", b"I")


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    mixed(tmp_path)
    assert read(tmp_path) == [*"ABCDEFGHI"]
    assert read(f"{tmp_path}/") == [*"ABCDEFGHI"]
    kinds = ["text", "text", "csv", "jsonl", "jsonl", "parquet", "text", "tsv", "text"]
    assert [kind_of(file) for file in opened(tmp_path).files] == kinds


@pytest.mark.parametrize("pattern, expected", [
    ("*.txt", "AI"), ("[ab].*", "B"), ("?.*", "ABCDEFI"), ("**/*.txt", "AI"), ("k/*", "H"), ("**/*.[tT][sSxX]*", "AGHI"),
    ("k*/**/*.*", "GH"), ("[B].txt", "A"), ("k/../z.*", "I"), ("**", "ABCDEFGHI"),
])  # fmt: skip
def test_a_pattern_is_the_files_that_a_shell_gives(tmp_path, monkeypatch, pattern, expected):
    """Hidden files only where the pattern says so; folders never."""
    mixed(tmp_path)
    for name in ("README", "picture.png", "dataset_info.json", "a.txt.bz2", "k/x.arrow"):
        (tmp_path / name).unlink()
    (tmp_path / "folder.txt").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read(pattern) == read(tmp_path / pattern) == [*expected]
    assert read(".h*.txt") == ["hidden"]


def test_a_name_with_the_signs_of_a_pattern_is_itself(tmp_path):
    write(tmp_path, "x[1].txt", b"one")
    write(tmp_path, "x1.txt", b"two")
    (tmp_path / "f[1]").mkdir()
    write(tmp_path, "f[1]/x.txt", b"three")
    assert read(tmp_path / "x[1].txt") == ["one"]
    assert read(tmp_path / "f[1]") == ["three"]


def test_a_file_of_any_name_is_text(tmp_path):
    for name in ("README", "x", "x.py", "x.log.1", "x.gz.txt"):
        assert read(write(tmp_path, name, b"text")) == ["text"]
    for name in ("README.gz", "x.py.zst", "x.1.GZ"):
        assert read(write(tmp_path, name, b"text")) == ["text"]


def test_what_is_not_there_or_not_meant_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for name in ("texts/a.txt", "texts/b.bin", "c.json", "d.JSON.gz", "e.bin.gz", "f.parquet.zst"):
        (tmp_path / name).write_bytes(b"{}")
    for path, said in {
        "nowhere.txt": "nowhere.txt is not a file, a folder or a pattern that fits one",
        "nowhere/*.txt": "nowhere/*.txt is not a file, a folder or a pattern that fits one",
        "empt[y]": "empt[y] is not a file, a folder or a pattern that fits one",
        "empty": f"the folder empty holds no file that ends in {', '.join(readers.KINDS)} (or these with .gz or .zst)",
        "texts": "texts holds both text and token files (.bin); name those that are meant, for example texts/*.txt",
        "texts/*": "texts/* holds both text and token files (.bin)",
        "c.json": "c.json is one JSON value, which would have to be read whole; write an object a line, as .jsonl",
        "[c].*": "c.json is one JSON value",
        "d.JSON.gz": "d.JSON.gz is one JSON value",
        "e.bin.gz": "e.bin.gz is read from many places at once, which .gz does not allow; decompress it",
        "f.parquet.zst": "f.parquet.zst is read from many places at once, which .zst does not allow; decompress it",
    }.items():
        assert refusal(path).startswith(said)
    assert kind_of(opened("texts/*.bin").files[0]) == "tokens"


def test_a_file_that_has_gone_is_a_user_error(tmp_path):
    source = opened(write(tmp_path, "x.txt", b"a"))
    (tmp_path / "x.txt").unlink()
    with pytest.raises(UserError, match=r"x\.txt cannot be read: .*No such file"):
        documents(source)


# ---- which source ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["names", "korean_names", "wiki"])
def test_a_named_corpus_is_that_of_the_table(name):
    source = open_source(SourceConfig(source=name), str(DATA))
    assert isinstance(source, NamedSource)
    assert documents(source) == list(CORPORA[name](str(DATA)))


def test_an_unknown_name_is_a_user_error():
    with pytest.raises(UserError, match="wiki"):
        open_source(SourceConfig(source="wikki"), str(DATA))


def test_a_name_with_an_owner_is_on_the_hub():
    """Which is not asked before rows are."""
    source = open_source(
        SourceConfig(source="owner/name", split="train", val_split="test"), "data", validation=True
    )
    assert isinstance(source, RowsSource)
    assert (source.name, source.split, source.path) == ("owner/name, split test", "test", None)


def test_validation_is_what_its_own_keys_name(tmp_path):
    for name in ("train", "val"):
        write(tmp_path, f"{name}.txt", name.encode())
        datasets.Dataset.from_dict({"text": [f"saved {name}"]}).save_to_disk(
            tmp_path / f"saved {name}"
        )
    splits = {split: datasets.Dataset.from_dict({"text": [split]}) for split in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")

    def both(path: str | None, **keys: str) -> tuple[list[str], list[str]]:
        config = SourceConfig(
            path=path and str(tmp_path / path),
            **{k: str(tmp_path / v) if k == "val_path" else v for k, v in keys.items()},
        )
        return tuple(
            documents(open_source(config, str(DATA), validation=validation))
            for validation in (False, True)
        )

    assert both("train.txt", val_path="val.txt") == (["train"], ["val"])
    assert both("train.txt", val_path="saved val") == (["train"], ["saved val"])
    assert both("saved train", val_path="saved val") == (["saved train"], ["saved val"])
    assert both("saved train", val_path="val.txt") == (["saved train"], ["val"])
    assert both("both", val_split="test") == (["train"], ["test"])
    assert both("both", split="test", val_split="train") == (["test"], ["train"])
    assert both("both", val_path="saved val") == (["train"], ["saved val"])
    assert both("saved train", val_path="both", val_split="test") == (["saved train"], ["test"])
    assert both(None, source="names", val_path="val.txt")[1] == ["val"]


@pytest.mark.parametrize("keys", [{"source": "names"}, {"path": "x.txt"}, {"path": "saved"}])
def test_a_validation_split_of_what_has_no_splits_is_refused(tmp_path, monkeypatch, keys):
    """It would be the training documents over again."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "x.txt", b"text")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk("saved")
    with pytest.raises(
        UserError,
        match=f"data.val_split is a split of a Hugging Face dataset, and {[*keys.values()][0]} has none",
    ):
        open_source(SourceConfig(**keys, val_split="test"), str(DATA), validation=True)


def test_an_optional_path_is_read_where_it_is_there_and_no_path_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "path.txt", b"path")
    write(tmp_path, "val.txt", b"val")

    def first(validation: bool = False, **keys: str) -> str:
        return next(
            open_source(
                SourceConfig(source="names", **keys), str(DATA), validation=validation
            ).pieces()
        )[0]

    assert first(optional_path="train.txt") == "emma"
    write(tmp_path, "train.txt", b"train")
    assert first(optional_path="train.txt") == "train"
    assert first(optional_path="train.txt", path="path.txt") == "path"
    assert first(optional_path="elsewhere.txt", path="path.txt") == "path"
    assert first(optional_path="train.txt", val_path="val.txt") == "train"
    assert first(optional_path="train.txt", val_path="val.txt", validation=True) == "val"
    Path("train").mkdir()
    write(Path("train"), "x.txt", b"folder")
    assert first(optional_path="train") == "folder"


def test_an_optional_path_counts_in_the_digest_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def digest(**keys: str) -> str:
        return open_source(SourceConfig(source="names", **keys), str(DATA)).digest()

    assert digest(optional_path="train.txt") == digest()
    write(tmp_path, "train.txt", b"train")
    assert digest(optional_path="train.txt") == digest(path="train.txt") != digest()


def test_a_config_of_the_whole_data_section_will_do(tmp_path):
    assert documents(
        open_source(DataConfig(path=str(write(tmp_path, "x.txt", b"text"))), "data")
    ) == ["text"]


# ---- Hugging Face datasets -------------------------------------------------------------------------------------------


def test_a_saved_dataset_is_its_column(tmp_path):
    texts = [f"row {i} é😀\n" * 3 for i in range(1001)] + [None, "", " \n", "\0", "x" * 3_000_000]
    rows = datasets.Dataset.from_dict({"n": range(len(texts)), "body": texts})
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    source = opened(tmp_path / "saved", text_field="body")
    assert isinstance(source, RowsSource)
    assert documents(source) == inked(texts)
    assert source.size is None


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow", "torch"])
def test_the_format_that_a_dataset_was_saved_in_does_not_matter(tmp_path, form):
    rows = datasets.Dataset.from_dict({"text": ["a", "b", None], "n": [1, 2, 3]}).with_format(
        form, columns=["n"]
    )
    rows.save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved").format["type"] == form
    assert read(tmp_path / "saved") == ["a", "b"]


def test_other_columns_are_not_decoded(tmp_path):
    """A picture that is none, in a column of pictures."""
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "image": [{"bytes": b"no picture", "path": None}] * 2},
        features=features,
    )
    rows.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ["a", "b"]


def test_a_saved_dataset_that_cannot_be_read_says_why(tmp_path):
    datasets.DatasetDict(
        {"all": datasets.Dataset.from_dict({"a": ["x"], "b": [1], "c": [["y"]]})}
    ).save_to_disk(tmp_path / "d")
    assert "has no split 'train'; it has all" in refusal(tmp_path / "d")
    place = f"{tmp_path / 'd'}, split all"
    assert (
        refusal(tmp_path / "d", split="all")
        == f"{place} has no field 'text'; there are a, b, c: set data.text_field"
    )
    assert refusal(tmp_path / "d", split="all", text_field="b").startswith(
        f"row 0 of {place}: the field 'b' holds int '1', not text"
    )
    assert refusal(tmp_path / "d", split="all", text_field="c").startswith(
        f"row 0 of {place}: the field 'c' holds list"
    )
    arrow = next((tmp_path / "d" / "all").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    assert "cannot be read" in refusal(tmp_path / "d", split="all", text_field="a")


@pytest.fixture
def local_hub(tmp_path, monkeypatch) -> Path:
    """A folder that the library reads as it reads a repository, and a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_streamed_dataset_has_the_documents_of_the_downloaded_one(local_hub, streaming):
    texts = [f"document {i}" for i in range(250)] + [None, ""]
    write(
        local_hub,
        "train.jsonl",
        "".join(json.dumps({"n": i, "body": text}) + "\n" for i, text in enumerate(texts)).encode(),
    )
    source = open_source(
        SourceConfig(source=str(local_hub), text_field="body"), "data", streaming=streaming
    )
    assert documents(source) == documents(source) == inked(texts)
    assert documents(pickle.loads(pickle.dumps(source))) == inked(texts)
    other = open_source(
        SourceConfig(source=str(local_hub), text_field="text"), "data", streaming=streaming
    )
    with pytest.raises(
        UserError, match="has no field 'text'; there are n, body: set data.text_field"
    ):
        documents(other)


def test_a_stream_that_breaks_off_is_a_user_error(local_hub):
    write(local_hub, "train.jsonl", b'{"text": "a"}\n' * 10 + b'{"text": \n')
    source = open_source(SourceConfig(source=str(local_hub)), "data", streaming=True)
    with pytest.raises(UserError, match="cannot be read"):
        documents(source)


# ---- digest ----------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_bytes_and_not_of_the_path(tmp_path):
    (tmp_path / "f").mkdir()
    a, b = write(tmp_path, "a.txt", b"text"), write(tmp_path / "f", "b.md", b"text")
    digests = {opened(path).digest() for path in (a, b, tmp_path / "f", f"{tmp_path}/*.txt")}
    assert len(digests) == 1
    assert re.fullmatch("[0-9a-f]{64}", digests.pop())


def test_every_byte_and_every_setting_counts_in_the_digest(tmp_path):
    raw = b'text\ttext,n\n"a"\t"b",7\n'
    (tmp_path / "f").mkdir()

    def digest(name: str, content: bytes = raw, **keys: str) -> str:
        return opened(write(tmp_path, name, content), **keys).digest()

    digests = [
        digest("x.txt", raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :]) for i in range(len(raw))
    ]
    digests += [
        digest("x.txt"),
        digest("x.csv"),
        digest("x.tsv"),
        digest("x.jsonl"),
        digest("x.txt", raw + b"\n"),
        digest("x.txt", b""),
    ]
    digests += [
        digest("x.txt", separator=separator) for separator in ("line", "blank_line", "<>", "\n")
    ]
    digests += [digest("x.txt", errors="replace"), digest("x.csv", text_field="n")]
    for name in ("x.md.gz", "x.md.zst"):  # the same bytes, which are decompressed or not
        (tmp_path / name).write_bytes(raw)
        digests.append(opened(tmp_path / name).digest())
    for parts in ((raw, raw), (raw[:5], raw[5:]), (raw[5:], raw[:5]), (raw, b""), (b"", raw)):
        for number, part in enumerate(parts):
            write(tmp_path / "f", f"{number}.txt", part)
        digests.append(opened(tmp_path / "f").digest())
    assert len(set(digests)) == len(digests) == len(raw) + 19


def test_keys_of_other_sources_do_not_count_in_the_digest(tmp_path):
    path = write(tmp_path, "x.txt", b"text")
    assert (
        opened(path, split="test", revision="main", config_name="en", val_path="y").digest()
        == opened(path).digest()
    )


def test_the_digest_of_a_saved_dataset_is_of_its_content(tmp_path):
    def digest(name: str, rows: dict, **keys: str) -> str:
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / name)
        return opened(tmp_path / name, **keys).digest()

    rows = {"text": ["a", "b"], "body": ["c", "d"]}
    assert digest("one", rows) == digest("two", rows)
    others = [
        digest("three", {**rows, "text": ["a", "c"]}),
        digest("four", rows, text_field="body"),
        digest("five", {**rows, "text": ["b", "a"]}),
    ]
    assert len({digest("one", rows), *others}) == 4


def test_the_digest_of_documents_is_of_them_alone(monkeypatch):
    class Texts(Source):
        def __init__(self, *texts: str):
            self.texts = texts

        def documents(self) -> Iterator[str]:
            yield from self.texts

    lists = [
        (),
        ("a",),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("c", "ab"),
        ("ab\0", "c"),
        ("ab", "\0c"),
        ("ab\ufffd", "c"),
    ]
    digests = [Texts(*texts).digest() for texts in lists]
    assert len(set(digests)) == len(lists)
    assert Texts("ab", "", " \n", "c").digest() == digests[2]
    monkeypatch.setattr(pieces, "PIECE", 1)
    monkeypatch.setattr(readers, "BLOCK", 1)
    assert [Texts(*texts).digest() for texts in lists] == digests


def test_the_digest_of_a_named_corpus_is_of_its_wheel_and_of_its_version(monkeypatch):
    """And those of the first version are what they were when the source code was hashed, so that shards are found again."""

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
    """And needs no network: not even a data folder."""

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


# ---- reading again, and how far --------------------------------------------------------------------------------------


def of_every_kind(folder: Path) -> list[Path]:
    texts = ["".join(random.Random(i).choices("abcdefghijklmnop", k=2000)) for i in range(400)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    table = "".join(f'"{text}"\n' for text in ["text", *texts]).encode()
    plain = "\n".join(texts).encode()
    parquet.write_table(pa.table({"text": texts}), folder / "x.parquet", row_group_size=150)
    named = {"x.txt": plain, "x.jsonl": lines, "x.csv": table}
    return [
        folder / "x.parquet",
        *(write(folder, name + suffix, raw) for name, raw in named.items() for suffix in PACK),
    ]


def test_the_position_goes_from_nothing_to_the_size(tmp_path):
    paths = of_every_kind(tmp_path)
    for path in [*paths, tmp_path]:
        files = paths if path == tmp_path else [path]
        source = opened(path, separator="line")
        assert source.size == sum(file.stat().st_size for file in files)
        for _ in range(2):
            with pieces_of(10_000, rows=100):
                positions = [source.position for _ in source.pieces()]
            assert positions == sorted(positions)
            assert len(positions) == 400 * len(files)
            assert source.position == source.size
            assert len({*positions}) >= 4
            assert positions[0] < source.size / 2


def test_a_source_is_read_the_same_twice_at_once_and_in_another_process(tmp_path):
    paths = of_every_kind(tmp_path)
    datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(tmp_path / "saved")
    named = open_source(SourceConfig(source="names"), str(DATA))
    for source in [
        *(opened(path, separator="line") for path in [*paths, tmp_path / "saved"]),
        named,
    ]:
        first = [*source.pieces()]
        assert len(first) >= 3
        assert [*source.pieces()] == first
        assert all(
            a == b == c for a, b, c in zip(source.pieces(), source.pieces(), first, strict=True)
        )
        copy = pickle.loads(pickle.dumps(source))
        assert [*copy.pieces()] == first
        assert (copy.name, copy.size, copy.digest()) == (source.name, source.size, source.digest())


def test_the_rows_of_a_dataset_do_not_travel(tmp_path):
    datasets.Dataset.from_dict({"text": ["a" * 1_000_000]}).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved")
    documents(source)
    assert "rows" in vars(source)
    assert vars(pickle.loads(pickle.dumps(source))).keys() == vars(source).keys() - {"rows"}


def test_a_reader_that_stops_early_leaves_the_file_closed(tmp_path):
    def held() -> list[str]:
        return [
            file.path
            for file in psutil.Process().open_files()
            if file.path.startswith(str(tmp_path))
        ]

    for path in of_every_kind(tmp_path):
        pieces = opened(path, separator="line").pieces()
        next(pieces)
        assert held() == [str(path)]
        pieces.close()
        assert held() == []


# ---- size ------------------------------------------------------------------------------------------------------------


def size_and_peak(source: Source) -> tuple[int, int]:
    """Characters that a source has, and the bytes that Python holds at once while it reads them."""
    tracemalloc.start()
    try:
        return sum(len(text) for text, _ in source.pieces()), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("separator", [None, "line", "blank_line", "<|endoftext|>"])
def test_a_line_of_64_mb_takes_memory_for_a_few_pieces(tmp_path, separator):
    with (tmp_path / "x.txt").open("wb") as file:
        for _ in range(64):
            file.write(b"one line, " * 100_000)
    size, peak = size_and_peak(opened(tmp_path / "x.txt", separator=separator))
    assert size == 64_000_000
    assert peak < 20_000_000


def test_dialogues_are_read_some_lines_at_a_time(tmp_path):
    line = "one utterance , " * 30 + "__eou__ another . __eou__\n"
    with (tmp_path / "x.txt").open("w") as file:
        for _ in range(64):
            file.write(line * 1000)
    size, peak = size_and_peak(opened(tmp_path / "x.txt"))
    assert size == 64_000 * (len(line) - len(" __eou__ __eou__ ") + len("A: B: ") + 1)
    assert (tmp_path / "x.txt").stat().st_size > 30_000_000
    assert peak < 10_000_000


def test_a_table_is_read_some_rows_at_a_time(tmp_path):
    """Of which 100 are 10 MB here, and all are 60 MB."""
    texts = ["one text, " * 10_000 for _ in range(600)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    parquet.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    for name in ("saved", "x.parquet"):
        size, peak = size_and_peak(opened(tmp_path / name))
        assert size == 60_000_000
        assert peak < 35_000_000


@pytest.mark.parametrize(
    "form", ["text", "line", "blank_line", "<|endoftext|>", "lines", "blank lines", "jsonl", "csv"]
)
def test_the_work_grows_with_the_text_and_not_with_its_square(folder, form, monkeypatch):
    """In processor time, of 16 times the text: 16 times or so, where the square would be 256 times."""
    monkeypatch.setattr(pieces, "PIECE", 1024)
    monkeypatch.setattr(
        readers, "BLOCK", 1024
    )  # so that there are 512 pieces to be joined wrongly, and 8,192

    def seconds(length: int) -> float:
        text = "one line, " * (length // 10)
        keys = {
            "separator": form
            if form in ("line", "blank_line", "<|endoftext|>")
            else {"lines": "line", "blank lines": "blank_line"}.get(form)
        }
        if form in ("lines", "blank lines"):
            text = text.replace(", ", "\n" if form == "lines" else "\n\n")
        name, raw = {
            "jsonl": ("x.jsonl", json.dumps({"text": text})),
            "csv": ("x.csv", f'text\n"{text}"'),
        }.get(form, ("x.txt", text))
        source = opened(write(folder, name, raw.encode()), **keys)
        times = []
        for _ in range(3):
            begin = time.thread_time()
            for _ in source.pieces():
                pass
            times.append(time.thread_time() - begin)
        return min(times)

    assert seconds(8_000_000) < 80 * seconds(500_000)


def test_a_file_source_has_pieces_alone():
    with pytest.raises(NotImplementedError):
        FileSource("none", [], SourceConfig()).documents()
