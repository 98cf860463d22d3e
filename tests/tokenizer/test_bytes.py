"""Tokenizers of bytes: all of them, and those that occur in a corpus."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.config.sections import SourceConfig
from pocketlm.corpus.named import CORPORA
from pocketlm.corpus.sources import open_source
from pocketlm.errors import UserError
from pocketlm.tokenizer.build import build_tokenizer, from_state
from pocketlm.tokenizer.bytes import ByteTokenizer, SeenBytesTokenizer
from pocketlm.tokenizer.streaming import stream_text
from tests.support.tokenizer_kinds import DATA, WIDE, arrays, stored

HANGUL = ["서연", "지우", "민준", "하윤 a"]


def seen_of(texts: list[str]) -> list[int]:
    return sorted(set("".join(texts).encode()))


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text() | WIDE, max_size=5), bos=st.booleans(), eos=st.booleans())
def test_seen_bytes_are_the_bytes_of_the_corpus_in_order_and_then_the_ends(texts, bos, eos):
    tokenizer = SeenBytesTokenizer.train(iter(texts), bos, eos)
    order = seen_of(texts)
    assert tokenizer.seen.tolist() == order
    assert tokenizer.vocab_size == len(order) + bos + eos
    assert (tokenizer.bos_id, tokenizer.eos_id) == (
        len(order) if bos else None,
        len(order) + bos if eos else None,
    )
    for text in texts:
        assert tokenizer.encode(text) == [order.index(byte) for byte in text.encode()]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert arrays(tokenizer, texts) == [tokenizer.encode(text) for text in texts]
    assert arrays(tokenizer, []) == []


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="".join(HANGUL)))
def test_seen_bytes_decode_undoes_encode_for_any_text_over_them(text):
    tokenizer = SeenBytesTokenizer.train(HANGUL)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (
        tokenizer.decode(
            [tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id, tokenizer.vocab_size + 7]
        )
        == text
    )


def test_seen_bytes_write_other_text_that_the_same_bytes_spell():
    """Its vocabulary has no characters: é and ñ are C3 A9 and C3 B1, and ± is C2 B1."""
    tokenizer = SeenBytesTokenizer.train(["é", "±"])
    assert tokenizer.decode(tokenizer.encode("ñ")) == "ñ"


def test_26_letters_have_27_entries_and_the_korean_names_58(tmp_path):
    """The vocabularies of microgpt: eos is the last token; the line separator is not a token."""
    (tmp_path / "names.txt").write_text("the\nquick\nbrown\nfox\njumps\nover\nlazy\ndogs\n")
    pieces = open_source(
        SourceConfig(path=str(tmp_path / "names.txt"), separator="line"), DATA
    ).pieces()
    tokenizer = build_tokenizer("seen-bytes", DATA, (text for text, _ in pieces))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (27, 26, None)
    assert tokenizer.encode("az") == [0, 25]
    assert stored(tokenizer, ["ab", "c"]) == [26, 0, 1, 26, 2, 26]
    korean = build_tokenizer("seen-bytes", DATA, CORPORA["korean_names"](str(DATA)))
    assert (korean.vocab_size, korean.eos_id, korean.dtype) == (58, 57, "<u2")


@pytest.mark.parametrize("text, shown", [
    ("서연x", "x"), ("x서연", "x"), ("\0", r"\x00"), ("서\n", r"\n"), ("하'", "'"),
    ("서연é", "é"), ("서나", "나"), ("서석", "석"), ("연😀", "😀"),
])  # fmt: skip
def test_a_byte_that_was_not_seen_is_a_user_error_that_shows_its_character(text, shown):
    """No byte of é was seen; the first byte of 나 was, and the first two of 석."""
    tokenizer = SeenBytesTokenizer.train(HANGUL)
    for ask in (tokenizer.encode, lambda text: tokenizer.encode_arrays(["서연", text, "y"])):
        with pytest.raises(UserError) as error:
            ask(text)
        quoted = '"\'"' if shown == "'" else f"'{shown}'"
        assert str(error.value).startswith(
            f"{quoted} has a byte that does not occur in the text "
            "on which the tokenizer 'seen-bytes' was trained"
        )
        assert str(error.value).endswith("data.tokenizer=byte")
        assert "\n" not in str(error.value)


def test_half_a_syllable_is_decoded_as_a_replacement_character():
    tokenizer = SeenBytesTokenizer.train(HANGUL)
    ids = tokenizer.encode("서연")
    assert [tokenizer.decode(ids[:n]) for n in range(7)] == [
        "",
        "\ufffd",
        "\ufffd",
        "서",
        "서\ufffd",
        "서\ufffd",
        "서연",
    ]
    assert tokenizer.decode(ids[1:]) == "\ufffd\ufffd연"


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="".join(HANGUL)))
def test_seen_bytes_stream_in_whole_syllables(text):
    tokenizer = SeenBytesTokenizer.train(HANGUL)
    assert [*stream_text(tokenizer, iter(tokenizer.encode(text)))] == [*text]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_seen_bytes_stream_any_ids_as_they_decode(data):
    tokenizer = SeenBytesTokenizer.train(HANGUL)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert "".join(stream_text(tokenizer, iter(ids))) == tokenizer.decode(ids)


def test_seen_bytes_go_through_state_and_pickle():
    tokenizer = SeenBytesTokenizer.train(HANGUL, True, True)
    for again in (
        from_state(json.loads(json.dumps(tokenizer.state()))),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert isinstance(again, SeenBytesTokenizer)
        assert again.state() == tokenizer.state()
        assert (again.fingerprint, again.name, again.kind) == (
            tokenizer.fingerprint,
            "seen-bytes",
            "seen-bytes",
        )
        assert again.encode("민준") == tokenizer.encode("민준")
    assert (
        SeenBytesTokenizer.train(HANGUL[::-1]).fingerprint
        == SeenBytesTokenizer.train(HANGUL).fingerprint
    )
    assert (
        SeenBytesTokenizer.train(HANGUL[1:]).fingerprint
        != SeenBytesTokenizer.train(HANGUL).fingerprint
    )
    everything = SeenBytesTokenizer(bytes(range(256)))
    assert (everything.vocab_size, everything.encode("é")) == (257, ByteTokenizer().encode("é"))
    assert everything.fingerprint != ByteTokenizer().fingerprint


def test_byte_ids_are_utf_8():
    assert ByteTokenizer().encode("é€") == [0xC3, 0xA9, 0xE2, 0x82, 0xAC]
    assert ByteTokenizer().vocab_size == 257
