"""Encodings: a text is the same in UTF-8, UTF-16 and UTF-32, with a byte order mark or without."""

import codecs

import pytest

from pocketlm.corpus.encodings import decode_text, detect_encoding
from pocketlm.errors import UserError
from tests.support.sources import SUFFIXES, open_path, read_path, refusal, small_pieces, write_file

TEXTS = {
    "English": "The river flows past old stone houses.\nPeople sell bread and fish.\n" * 3,
    "French": "L'été où naïveté et cœur se mêlèrent.\n" * 3,
    "Russian": "река течёт мимо старых домов, и люди продают хлеб.\n" * 3,
    "Korean": "강은 오래된 집을 지나 흐른다. 사람들이 빵을 판다.\n" * 3,
    "emoji": "fish 😀 and bread 🎈\n" * 3,
}
MARKS = {
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize("marked", [True, False])
def test_a_text_is_read_as_in_utf_8(tmp_path, text, encoding, marked):
    """Text of PowerShell's `>` was garbage with errors=replace, or trained on NULs."""
    raw = MARKS[encoding] * marked + text.encode(encoding)
    with small_pieces(7):
        assert read_path(write_file(tmp_path, "x.txt", raw), separator="line") == text.splitlines()
    assert decode_text(raw, "x") == text


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name, text", [
    ("x.jsonl", '{"text": "één"}\n{"text": "two"}\n'), ("x.csv", 'text,n\n"één",1\n"two",2\n'),
    ("x.tsv", "n\ttext\n1\téén\n2\ttwo\n"),
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_tables_are_read_in_every_encoding(tmp_path, name, text, suffix, encoding):
    assert read_path(write_file(tmp_path, name + suffix, text.encode(encoding))) == ["één", "two"]


def test_dialogues_are_recognised_in_every_encoding(tmp_path):
    path = write_file(tmp_path, "x.txt", "Hi . __eou__ Hello . __eou__\n".encode("utf-16"))
    assert read_path(path) == ["A: Hi .\nB: Hello .\n"]


@pytest.mark.parametrize("raw", [
    b"", b"a", b"\0", b"a\0", b"a\0b", b"one\0two\0three\0", b"\0" * 40, "é\0a".encode() * 40,
    b"find -print0\0gives\0such\0lists\0", bytes(range(128)),
])  # fmt: skip
def test_utf_8_with_nuls_stays_utf_8(raw):
    assert detect_encoding(raw) == "utf-8"


def test_a_broken_unit_is_refused_by_its_byte_and_the_encoding(tmp_path):
    raw = "a text, and half a unit".encode("utf-16-le") + b"\x20"
    message = refusal(write_file(tmp_path, "x.txt", raw))
    assert message.startswith(f"{tmp_path / 'x.txt'} is not UTF-16-LE: byte {len(raw) - 1} is 0x20")
    assert message.endswith("converted with iconv -f ENCODING -t UTF-8")
    assert read_path(tmp_path / "x.txt", errors="replace")[0].endswith("unit\ufffd")


def test_the_encoding_counts_in_the_digest(tmp_path):
    """The same bytes were once another text, of which shards may be in the cache."""
    path = write_file(tmp_path, "x.txt", TEXTS["English"].encode("utf-16-le"))
    source = open_path(path)
    assert source.format_in_digest(path) == ["text", None, "utf-16-le"]
    path.write_text(TEXTS["English"])
    assert source.format_in_digest(path) == ["text", None]


@pytest.mark.parametrize("raw", [
    b"The river\r\nflows\r\n", b"\xef\xbb\xbfThe river\nflows\n",
    "The river\r\nflows\r\n".encode("utf-16"), "The river\nflows\n".encode("utf-16-le"),
])  # fmt: skip
def test_a_prompt_is_the_same_whatever_program_saved_it(raw):
    assert decode_text(raw, "the prompt") == "The river\nflows\n"


def test_a_prompt_that_is_no_text_is_refused_by_its_byte():
    with pytest.raises(UserError, match="^the prompt is not UTF-8: byte 3 is 0xe9$"):
        decode_text(b"caf\xe9", "the prompt")


@pytest.mark.parametrize("raw", [b"aa\0\0", b"\0\0\0a", b"a\0b", b"one line\0and its end\n"])
def test_a_few_zero_bytes_are_characters_of_utf_8(raw):
    assert detect_encoding(raw) == "utf-8"
    assert decode_text(raw, "x") == raw.decode()
