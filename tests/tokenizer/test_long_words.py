"""Training a BPE on text with no place to cut: a word has a limit, and other text has none."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.tokenizer import bpe
from pocketlm.tokenizer.bpe import LONGEST_WORD, JsonTokenizer, cut_long_words

CLASSES = {"letters": "aé강", "digits": "0५", "others": "._😀", "spaces": " \n\u3000"}
WORD = st.sampled_from(list(CLASSES.values())).flatmap(
    lambda characters: st.builds(
        lambda character, count: character * count,
        st.sampled_from(characters),
        st.sampled_from([1, 3, LONGEST_WORD - 1, LONGEST_WORD, LONGEST_WORD + 1, 5000]),
    )
)


@settings(max_examples=150, deadline=None)
@given(st.lists(WORD, max_size=6).map("".join))
def test_no_word_is_longer_than_the_limit_and_no_character_is_lost(text):
    parts = list(cut_long_words(text))
    assert "".join(parts) == text
    for part in parts:
        for characters in CLASSES.values():
            words = re.findall(f"[{re.escape(characters)}]+", part)
            assert all(len(word) <= LONGEST_WORD for word in words)


@pytest.mark.parametrize("word", ["x" * LONGEST_WORD, "AC1" * 2000, "a.b" * 2000, "words " * 1000])
def test_a_text_of_short_words_is_left_whole(word):
    text = f"before {word} after"
    assert list(cut_long_words(text)) == [text]


def test_no_token_is_learnt_across_a_cut():
    """Without a limit, the time for a word grows with its square: 300,000 letters took 32 s."""
    text = "ab" * 8 * LONGEST_WORD
    tokenizer = JsonTokenizer.train_bpe([text], 272)
    longest = max(map(len, tokenizer.backend.get_vocab()))
    assert longest == LONGEST_WORD
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_limit_changes_nothing_for_a_text_of_short_words(monkeypatch):
    texts = ["the river flows past old stone houses " * 20, "1234 5678 " * 50, "naïve 😀!" * 30]
    limited = JsonTokenizer.train_bpe(texts, 300).json_text
    monkeypatch.setattr(bpe, "cut_long_words", lambda text: [text])
    assert JsonTokenizer.train_bpe(texts, 300).json_text == limited
