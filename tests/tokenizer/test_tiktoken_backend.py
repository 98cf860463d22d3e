"""The fast path of byte-pair encoding: equal to the `tokenizers` library, or not taken."""

import json
import sys

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from pocketlm.corpus.named import CORPORA
from pocketlm.tokenizer.bpe import JsonTokenizer, byte_level_backend
from pocketlm.tokenizer.build import build_tokenizer
from pocketlm.tokenizer.streaming import byte_letters
from pocketlm.tokenizer.tiktoken_backend import SEPARATOR, may_have_wide_gap
from tests.support.tokenizer_kinds import DATA, arrays, backend_ids, changed, named, trained, wiki


@pytest.mark.parametrize(
    "texts",
    [
        ["a", SEPARATOR, "b"],
        ["", f"x{SEPARATOR}", "", "y"],
        [SEPARATOR * 2],
        [SEPARATOR[:2], SEPARATOR[1:]],
        [],
        [""],
    ],
)
def test_texts_that_hold_the_letters_which_join_them_stay_apart(texts):
    tokenizer = JsonTokenizer.gpt2(DATA)
    assert [ids.tolist() for ids in tokenizer.encode_arrays(texts)] == [
        tokenizer.encode(text) for text in texts
    ]


def merges_of(
    pairs: list[tuple[str, str]], ids: list[int] | None = None, **settings: object
) -> JsonTokenizer:
    """Return a byte-level BPE of the 256 bytes and these merges, with the `ids` of the merges."""
    letters = [letter for _, letter in sorted(byte_letters().items())]
    vocab = dict(
        zip(
            [*letters, *map("".join, pairs)],
            [*range(256), *(ids or range(256, 256 + len(pairs)))],
            strict=True,
        )
    )
    return JsonTokenizer(
        byte_level_backend(models.BPE(vocab=vocab, merges=pairs, **settings)).to_str(),
        "merges",
        None,
        None,
    )


PARTS = [
    "the", " the", "cat", "'s", "'ll", "'S", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000",
    "\u2028", "\x1c", "\x85", "12", "३", "½", "é", "e\u0301", "中文", "한국", "😀", "🏳️‍🌈",
    "!", "...", "—", "_", "<|endoftext|>", "<|beginoftext|>", "\0", "\ufeff", "\ufffd",
    "ª", "ǅ", "ʰ",
]  # fmt: skip


MIXED = st.lists(
    st.sampled_from(PARTS) | st.characters(exclude_categories=["Cs"]), max_size=20
).map("".join)


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(
        MIXED | st.text(alphabet="  \n\n\t\u3000\ra'1", max_size=30), min_size=1, max_size=3
    )
)
def test_the_fast_path_equals_the_library_on_any_text(kind, texts):
    tokenizer = trained() if kind == "trained" else named(kind)
    assert tokenizer.fast_encoding is not None
    assert arrays(tokenizer, texts) == backend_ids(tokenizer, texts)


def test_the_fast_path_equals_the_library_around_every_kind_of_character():
    """Each library has its own table of letters, numbers and white space.

    Large uniform blocks of Unicode are sampled.
    """
    blocks = [
        range(0x3400),
        range(0x3400, 0xD800, 16),
        range(0xE000, 0xFE00, 16),
        range(0xFE00, 0x17000),
        range(0x17000, 0x18D00, 16),
        range(0x18D00, 0x20000),
        range(0x20000, 0x110000, 256),
    ]
    texts = [f"a{c}1{c} {c}" for block in blocks for c in map(chr, block)]
    assert len(texts) > 70_000
    assert arrays(named("gpt2"), texts) == backend_ids(named("gpt2"), texts)


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
@pytest.mark.parametrize("corpus, step", [("wiki", 3), ("shakespeare", 4), ("sotu", 10)])
def test_the_fast_path_equals_the_library_on_a_corpus(kind, corpus, step):
    tokenizer = trained() if kind == "trained" else named(kind)
    documents = list(CORPORA[corpus](str(DATA)))[::step]
    assert sum(map(len, documents)) > 1_000_000
    assert arrays(tokenizer, documents) == backend_ids(tokenizer, documents)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_arrays_equal_the_library_whatever_the_merges_are(data):
    """Some merges come from no training: unreachable tokens, or tokens that two pairs spell."""
    tokens, pairs = [*"abc"], []
    for _ in range(data.draw(st.integers(0, 8))):
        pair = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
        if "".join(pair) not in tokens:
            pairs.append(pair)
            tokens.append("".join(pair))
    ids = data.draw(st.just(None) | st.permutations(range(256, 256 + len(pairs))))
    tokenizer = merges_of(pairs, ids, ignore_merges=data.draw(st.booleans()))
    texts = data.draw(st.lists(st.text(alphabet="aabbc ", max_size=30), min_size=1, max_size=5))
    assert arrays(tokenizer, texts) == backend_ids(tokenizer, texts)


@pytest.mark.parametrize("pairs, expected", [
    ([("a", "b"), ("ab", "c")], True),
    ([("a", "b"), ("c", "d"), ("ab", "cd")], True),
    ([("a", "a"), ("aa", "a"), ("aa", "aa")], True),
    ([("b", "c"), ("a", "b"), ("ab", "c")], False),  # a bc is never joined, and spells abc
    ([("a", "a"), ("a", "aa")], False),  # aaa is aa a
])  # fmt: skip
def test_merges_that_the_fast_path_can_express(pairs, expected):
    tokenizer = merges_of(pairs)
    assert (tokenizer.fast_encoding is not None) == expected
    texts = ["".join(pair) for pair in pairs] + ["xabcd", "aaaa", "aaaaaaa", "abcabc bc"]
    assert arrays(tokenizer, texts) == backend_ids(tokenizer, texts)


INEXPRESSIBLE = {
    "a normalizer": lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
    "another splitter": lambda backend: setattr(
        backend, "pre_tokenizer", pre_tokenizers.Metaspace()
    ),
    "two splitters": lambda backend: setattr(
        backend,
        "pre_tokenizer",
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "no splitter": lambda backend: setattr(backend, "pre_tokenizer", None),
    "a first space": lambda backend: setattr(
        backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "no pattern": lambda backend: setattr(
        backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ),
    "a token of its own": lambda backend: backend.add_tokens(["the cat"]),
    "a normalizer of punctuation": lambda backend: setattr(
        backend, "normalizer", normalizers.Replace("!", "?")
    ),
    "whole words first": lambda backend: setattr(backend.model, "ignore_merges", True),
}


@pytest.mark.parametrize("what", INEXPRESSIBLE)
def test_the_library_does_what_the_fast_path_cannot_express(what):
    tokenizer = changed(trained(), INEXPRESSIBLE[what])
    texts = ["The Cat the cat 12 é!", "", " the  cat\n"]
    assert tokenizer.fast_encoding is None
    assert arrays(tokenizer, texts) == backend_ids(tokenizer, texts)
    assert arrays(changed(trained(), lambda backend: None), texts) == backend_ids(trained(), texts)


def test_merges_out_of_the_order_of_their_ids_are_not_expressible():
    """The merge ab goes first, and bc has the lower id."""
    tokenizer = merges_of([("a", "b"), ("b", "c")], [257, 256])
    assert tokenizer.fast_encoding is None
    assert arrays(tokenizer, ["abc"]) == [tokenizer.encode("abc")] == [[257, ord("c")]]


def test_a_vocabulary_that_lacks_a_byte_is_not_expressible():
    backend = byte_level_backend(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer = JsonTokenizer(backend.to_str(), "ab", None, None)
    assert tokenizer.fast_encoding is None
    assert arrays(tokenizer, ["abcab"]) == [[2, 2]]


def test_a_merge_of_letters_that_spell_no_byte_is_not_expressible():
    """No text contains such letters, so the merge is never used."""
    letters = [*byte_letters().values()]
    vocab = {letter: i for i, letter in enumerate([*letters, "▁", "▁a"])}
    tokenizer = JsonTokenizer(
        byte_level_backend(models.BPE(vocab=vocab, merges=[("▁", "a")])).to_str(), "odd", None, None
    )
    assert tokenizer.fast_encoding is None
    assert arrays(tokenizer, ["▁a a"]) == [tokenizer.encode("▁a a")]


def test_a_file_of_the_librarys_early_versions_has_the_fast_path(tmp_path):
    """GPT-2's own file is one: it lacks the options that did not exist then."""
    spec = json.loads(trained().json_text)
    del (
        spec["pre_tokenizer"]["use_regex"],
        spec["model"]["ignore_merges"],
        spec["model"]["byte_fallback"],
        spec["model"]["type"],
    )
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = build_tokenizer(str(tmp_path), DATA)
    assert tokenizer.fast_encoding is not None
    assert arrays(tokenizer, wiki()[:20]) == backend_ids(trained(), wiki()[:20])


@pytest.mark.parametrize(
    "gap",
    [" " * 1_100_000, "\n" * 1_100_000, "\u3000\t" * 550_000],
    ids=["spaces", "lines", "mixed"],
)
def test_more_white_space_than_the_fast_path_can_take(gap):
    texts = [f"a{gap}b", "c", gap]
    assert arrays(named("gpt2"), texts) == backend_ids(named("gpt2"), texts)


def test_every_gap_of_131072_is_seen():
    for start in (0, 1, 40_000, 65_535, 65_536, 65_537, 100_000):
        for after in (0, 1, 40_000, 70_000):
            assert may_have_wide_gap("x" * start + " " * 2**17 + "x" * after)
    assert not may_have_wide_gap("")
    assert not may_have_wide_gap(("x" + " " * 1000) * 200)
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert set(regex.findall(r"\s", everything)) <= {c for c in everything if c.isspace()}


@pytest.mark.timeout(60)
def test_a_word_of_a_million_letters_takes_seconds_at_most():
    """It takes a second; merging in quadratic time would take hours."""
    row = named("gpt2").encode_arrays(["ab" * 500_000])[0]
    assert named("gpt2").decode(row.tolist()) == "ab" * 500_000
