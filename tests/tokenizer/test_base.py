"""Text to ids and back, for every kind of tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tokenizer_kinds import BYTE_LEVEL, KINDS, SYMBOLS, WIDE, arrays, named


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@settings(max_examples=100, deadline=None)
@given(text=st.text() | WIDE)
def test_decode_undoes_encode_for_any_text(kind, text):
    assert named(kind).decode(named(kind).encode(text)) == text


def test_arrays_are_each_text_by_itself(tokenizer):
    texts = ["a", "", "bb 中", "a  b\n\n", "<|endoftext|>"]
    assert arrays(tokenizer, texts) == [tokenizer.encode(text) for text in texts]
    assert arrays(tokenizer, []) == []


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text() | WIDE, max_size=4))
def test_arrays_of_any_texts_are_each_text_by_itself(kind, texts):
    assert arrays(named(kind), texts) == [named(kind).encode(text) for text in texts]


def test_every_id_is_below_the_vocabulary_size_and_decodes(tokenizer):
    assert max(tokenizer.encode("".join(map(chr, range(300))) + SYMBOLS)) < tokenizer.vocab_size
    for i in range(min(tokenizer.vocab_size, 400)):
        assert isinstance(tokenizer.decode([i]), str)


def test_an_id_of_a_padded_vocabulary_decodes(tokenizer):
    """With a model.vocab_size above the tokenizer's, a model can draw an id without a text."""
    assert isinstance(tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 40]), str)
