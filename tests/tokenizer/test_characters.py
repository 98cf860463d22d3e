"""The tokenizer of characters: all of a corpus, or the most common."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.errors import UserError
from pocketlm.tokenizer.build import build_tokenizer, from_state
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.tokenizer_kinds import DATA, SYMBOLS, arrays, named


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=SYMBOLS))
def test_char_decode_undoes_encode_for_text_of_its_symbols(text):
    ids = named("char").encode(text)
    assert named("char").decode(ids) == text
    assert len(ids) == len(text)


@settings(max_examples=100, deadline=None)
@given(
    symbols=st.sets(st.characters(exclude_categories=["Cs"]), max_size=8),
    text=st.text(),
    bos=st.booleans(),
    eos=st.booleans(),
)
def test_char_arrays_hold_known_unknown_and_astral_characters(symbols, text, bos, eos):
    tokenizer = CharTokenizer.train(symbols, bos, eos)
    text += "".join(symbols) + "\U0010ffff\0"
    order = sorted(symbols, key=ord)
    expected = [
        1 + bos + eos + order.index(character) if character in symbols else 0 for character in text
    ]
    assert tokenizer.encode(text) == expected
    assert arrays(tokenizer, [text]) == [expected]


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_take_two_bytes_while_they_fit(vocab_size, dtype):
    """The symbols are of the astral planes, and just as many as this vocabulary needs."""
    symbols = "".join(map(chr, range(0x10000, 0x10000 + vocab_size - 2)))
    tokenizer = CharTokenizer(symbols)
    assert (tokenizer.vocab_size, tokenizer.dtype) == (vocab_size, dtype)
    assert arrays(tokenizer, [symbols]) == [list(range(2, vocab_size))]


def test_char_ids_are_in_code_point_order_and_an_unknown_symbol_is_0():
    tokenizer = CharTokenizer.train(["hello"])
    assert tokenizer.encode("ehlo") == [2, 3, 4, 5]
    assert tokenizer.encode("hxe") == [3, 0, 2]
    assert tokenizer.decode([3, 0, 2]) == "h\ufffde"
    assert tokenizer.vocab_size == 6


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="aaabbc é中😀\n") | st.text(), max_size=5),
    size=st.integers(4, 14),
    bos=st.booleans(),
    eos=st.booleans(),
)
def test_a_sized_char_keeps_the_commonest_characters_and_of_equals_the_lowest(
    texts, size, bos, eos
):
    tokenizer = build_tokenizer(f"char:{size}", DATA, iter(texts), bos, eos)
    text, room = "".join(texts), size - 1 - bos - eos
    ranked = sorted(set(text), key=lambda symbol: (-text.count(symbol), ord(symbol)))
    kept, lost = sorted(ranked[:room], key=ord), ranked[room:]
    assert tokenizer.symbols == "".join(kept)
    assert tokenizer.name == f"char:{size}"
    assert tokenizer.vocab_size == 1 + bos + eos + len(kept) <= size
    assert tokenizer.decode(tokenizer.encode(text)) == "".join(
        "\ufffd" if symbol in lost else symbol for symbol in text
    )
    assert arrays(tokenizer, texts) == [tokenizer.encode(text) for text in texts]
    assert bool(tokenizer.note) == bool(lost)


def test_a_sized_char_says_how_many_characters_it_leaves_out_and_what_becomes_of_them():
    tokenizer = build_tokenizer("char:5", DATA, ["aaaabbb", "cccdd!"])
    assert tokenizer.symbols == "abc"
    assert tokenizer.encode("abcd!") == [2, 3, 4, 0, 0]
    assert tokenizer.note == (
        "the training text has 5 different characters; char:5 keeps the 3 most common, "
        "and the other 2, 23.08% of the text, become <unk>"
    )
    assert build_tokenizer("char:7", DATA, ["aaaabbb", "cccdd!"]).note == ""
    assert build_tokenizer("char", DATA, ["aaaabbb", "cccdd!"]).note == ""


@pytest.mark.parametrize(
    "bos, eos, least",
    [(False, False, 2), (False, True, 3), (None, None, 3), (True, False, 3), (True, True, 4)],
)
def test_a_sized_char_has_room_for_one_character_at_least(bos, eos, least):
    assert build_tokenizer(f"char:{least}", DATA, ["baa"], bos, eos).symbols == "a"
    with pytest.raises(UserError, match=f"write char:SIZE with a size of {least} or more"):
        build_tokenizer(f"char:{least - 1}", DATA, ["baa"], bos, eos)


@pytest.mark.parametrize("bos, eos", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_sized_char_that_suffices_is_the_plain_one_but_for_its_name(size, bos, eos):
    """This holds from the exact size on."""
    plain = build_tokenizer("char", DATA, [SYMBOLS, "aab"], bos, eos)
    sized = build_tokenizer(f"char:{plain.vocab_size + size}", DATA, [SYMBOLS, "aab"], bos, eos)
    assert {**sized.state(), "name": "char"} == plain.state()
    assert sized.fingerprint == plain.fingerprint
    assert sized.encode(SYMBOLS + "?") == plain.encode(SYMBOLS + "?")
    smaller = build_tokenizer(f"char:{plain.vocab_size - 1}", DATA, [SYMBOLS, "aab"], bos, eos)
    assert smaller.fingerprint != plain.fingerprint
    assert smaller.vocab_size == plain.vocab_size - 1


def test_a_sized_char_keeps_its_name_through_state_and_pickle():
    tokenizer = build_tokenizer("char:6", DATA, [SYMBOLS, "aab"])
    for again in (
        from_state(json.loads(json.dumps(tokenizer.state()))),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again.state() == tokenizer.state()
        assert (again.name, again.kind, again.fingerprint) == (
            "char:6",
            "char",
            tokenizer.fingerprint,
        )
        assert again.encode(SYMBOLS) == tokenizer.encode(SYMBOLS)
