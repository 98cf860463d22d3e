"""Text files to documents: compression, separators, and bytes that are not UTF-8."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pocketlm.corpus.encodings import detect_encoding
from pocketlm.corpus.pieces import PIECE_CHARACTERS, Source
from tests.support.sources import (
    COMPRESS,
    SUFFIXES,
    compress_zstd,
    documents_of,
    not_blank,
    open_path,
    read_path,
    refusal,
    small_pieces,
    write_file,
)

# ---- compression ----


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        1000,
        PIECE_CHARACTERS - 1,
        PIECE_CHARACTERS,
        PIECE_CHARACTERS + 1,
        3 * PIECE_CHARACTERS + 5,
    ],
)
def test_a_file_is_one_document_byte_for_byte(tmp_path, suffix, size):
    raw = ("é\r\n\0a" * size)[:size].encode()
    path = write_file(tmp_path, f"x.txt{suffix}", raw, (7, 7, size // 2))
    assert [text.encode() for text in read_path(path)] == [raw] * bool(raw)


def test_a_byte_order_mark_is_text_in_a_text_file(tmp_path):
    path = write_file(tmp_path, "x.txt", b"\xef\xbb\xbfa\r\nb\r\n")
    assert read_path(path) == ["\ufeffa\r\nb\r\n"]
    assert read_path(path, separator="line") == ["\ufeffa", "b"]


def test_skippable_zstandard_frames_are_skipped(tmp_path):
    """The program pzstd writes a skippable frame before each frame of text."""
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00size"
    (tmp_path / "x.txt.zst").write_bytes(
        skipped + compress_zstd(b"one ") + skipped + compress_zstd(b"") + compress_zstd(b"two")
    )
    assert read_path(tmp_path / "x.txt.zst") == ["one two"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_file_is_a_user_error_that_names_it(tmp_path, suffix, share):
    path = write_file(tmp_path, f"x.txt{suffix}", bytes(range(128)) * 100_000)
    raw = path.read_bytes()
    path.write_bytes(raw[: max(5, int(len(raw) * share))])
    assert refusal(path).startswith(f"{path} cannot be read: ")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["not compressed", "changed", "more at the end"])
def test_a_damaged_file_is_a_user_error_that_names_it(tmp_path, suffix, damage):
    raw = COMPRESS[suffix](b"the cat sat on the mat, the dog on the log" * 50)
    changed = raw[:10] + b"\xff" * 8 + raw[18:]
    path = tmp_path / f"x.txt{suffix}"
    damaged = {
        "not compressed": b"plain text",
        "changed": changed,
        "more at the end": raw + b"more",
    }
    path.write_bytes(damaged[damage])
    assert refusal(path).startswith(f"{path} cannot be read: ")


# ---- text files ----


def split_whole(text: str, separator: str | None) -> list[str]:
    """Return the documents of a text that is in memory as a whole."""
    if separator is None:
        return [text]
    if separator == "line":
        return [line.removesuffix("\r") for line in text.split("\n")]
    if separator == "blank_line":
        groups = itertools.groupby(text.split("\n"), key=lambda line: bool(line.strip()))
        return ["\n".join(lines).removesuffix("\r") for has_text, lines in groups if has_text]
    return text.split(separator)


SEPARATORS = [
    None, "line", "blank_line", "<>", "<><>", "<>a<>", "aa", "\n\n", "\n", "\r\n", "😀", "é<", " ",
    "\0", "a" * 9,
]  # fmt: skip
PARTS = [
    "a", "b", "aa", "<", ">", "<>", " ", "  ", "\n", "\n\n", "\r\n", "\r", "\t", "é", "😀", "\0",
    "\ufeff", "\u2028", "\x85", "\x0b",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=40).map("".join)


@settings(max_examples=600, deadline=None)
@given(
    text=TEXT,
    separator=st.sampled_from(SEPARATORS)
    | st.text(min_size=1, max_size=4).filter(lambda s: s not in ("line", "blank_line")),
    size=st.integers(1, 12) | st.just(100),
    suffix=st.sampled_from(SUFFIXES),
    cuts=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_the_documents_of_a_text_are_those_of_splitting_it_whole(
    folder, text, separator, size, suffix, cuts
):
    assume(detect_encoding(text.encode()) == "utf-8")  # NULs may look like UTF-16
    path = write_file(folder, f"x.txt{suffix}", text.encode(), cuts)
    with small_pieces(size):
        assert read_path(path, separator=separator) == not_blank(split_whole(text, separator))


@settings(max_examples=600, deadline=None)
@given(
    text=st.text(alphabet="a\r\n ", max_size=14),
    separator=st.sampled_from(["line", "blank_line"]),
    size=st.integers(1, 4),
)
def test_the_ends_of_lines_are_those_of_the_whole_text(folder, text, separator, size):
    path = write_file(folder, "x.txt", text.encode())
    with small_pieces(size):
        assert read_path(path, separator=separator) == not_blank(split_whole(text, separator))


def test_lines_as_windows_ends_them(tmp_path):
    path = write_file(tmp_path, "x.txt", b"a\r\nb\r\n\r\nc\rd\r\n")
    assert read_path(path, separator="line") == ["a", "b", "c\rd"]
    assert read_path(path, separator="blank_line") == ["a\r\nb", "c\rd"]
    assert read_path(path) == ["a\r\nb\r\n\r\nc\rd\r\n"]


@pytest.mark.parametrize("separator", ["<|endoftext|>", "line", "blank_line"])
@pytest.mark.parametrize("offset", range(-16, 3))
def test_a_separator_over_the_border_of_two_blocks_separates(tmp_path, separator, offset):
    """The blocks have the size that they have outside of tests."""
    end = {"line": "\n", "blank_line": "\r\n \r\n"}.get(separator, separator)
    long, short = "x" * (PIECE_CHARACTERS + offset), "é" * 1000
    path = write_file(tmp_path, "x.txt", f"{long}{end}{short}{end}{long}".encode())
    assert read_path(path, separator=separator) == [long, short, long]


def test_equal_documents_have_equal_pieces_wherever_they_are(folder):
    """The first piece decides in which split a document is."""
    text = "abcdefghij" * 3
    for before in range(25):
        path = write_file(folder, "x.txt", f"{'y' * before}<>{text}<>{text}".encode())
        with small_pieces(7):
            pieces = list(open_path(path, separator="<>").pieces())
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
    path = write_file(folder, "x.txt", "<>".join(texts).encode())
    with small_pieces(8):
        assert list(Whole().pieces()) == list(open_path(path, separator="<>").pieces())
        assert documents_of(Whole()) == not_blank(texts)


def test_a_separator_ends_with_its_file(tmp_path):
    for name, text in (
        ("a.txt", "one\ntwo"),
        ("b.txt", "three\n"),
        ("c.txt", "\n \n"),
        ("d.txt", "four"),
    ):
        (tmp_path / name).write_text(text)
    assert read_path(tmp_path, separator="line") == ["one", "two", "three", "four"]
    assert read_path(tmp_path) == ["one\ntwo", "three\n", "four"]


# ---- bytes that are not UTF-8 ----

COMPLETE = [character.encode() for character in ("a", "\n", "é", "€", "😀")]
INCOMPLETE = [b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xff", b"\x80", b"\xed\xa0\x80"]
PART = st.sampled_from([*COMPLETE, *INCOMPLETE]) | st.binary(max_size=3)
BYTES = st.lists(PART, max_size=15).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(raw=BYTES, size=st.integers(1, 9), suffix=st.sampled_from(SUFFIXES))
def test_bytes_that_are_not_utf_8_are_found_or_replaced_as_in_the_whole(folder, raw, size, suffix):
    assume(detect_encoding(raw) == "utf-8")  # NULs may look like UTF-16
    path = write_file(folder, f"x.txt{suffix}", raw, (4,))
    with small_pieces(size):
        assert read_path(path, errors="replace") == not_blank([raw.decode(errors="replace")])
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            expected = (
                f"{path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}; "
                "data.errors=replace reads such bytes as U+FFFD, and a text in another encoding is "
                "converted with iconv -f ENCODING -t UTF-8"
            )
            assert refusal(path) == expected
            assert refusal(path, separator="line") == expected
        else:
            assert read_path(path) == not_blank([text])


@pytest.mark.parametrize(
    "before",
    [
        0,
        1,
        PIECE_CHARACTERS - 2,
        PIECE_CHARACTERS - 1,
        PIECE_CHARACTERS,
        PIECE_CHARACTERS + 1,
        5_000_001,
    ],
)
@pytest.mark.parametrize("wrong", [b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98"])
@pytest.mark.parametrize("after", [b"", b"more"])
def test_the_number_of_a_wrong_byte_is_right_at_block_borders_and_at_the_end(
    tmp_path, before, wrong, after
):
    path = write_file(tmp_path, "x.txt", b"x" * before + wrong + after)
    assert f"byte {before} is 0x{wrong[0]:02x}" in refusal(path)
    assert read_path(path, errors="replace") == ["x" * before + "\ufffd" + after.decode()]


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv"])
def test_wrong_bytes_in_a_table_are_refused_or_replaced(tmp_path, name):
    raw = {"x.jsonl": b'{"text": "a"}\n{"text": "b\xe9c"}\n'}.get(name, b'text\na\n"b\xe9c"\n')
    assert f"byte {raw.index(0xE9)} is 0xe9" in refusal(write_file(tmp_path, name, raw))
    assert read_path(tmp_path / name, errors="replace") == ["a", "b\ufffdc"]
