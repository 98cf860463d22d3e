"""GPT-2's vocabulary trimmed to a corpus is still GPT-2's byte-pair encoding."""

import json
import pickle
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from pocketlm.data.prepare import prepare
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import END_OF_TEXT
from pocketlm.tokenizer.bpe import JsonTokenizer, byte_level_backend
from pocketlm.tokenizer.build import build_tokenizer, from_state
from pocketlm.tokenizer.streaming import byte_letters
from pocketlm.tokenizer.tiktoken_backend import GPT2_PATTERN
from pocketlm.tokenizer.trimming import merge_counts, text_batches, trim_vocabulary
from tests.support.preparation import byte_config
from tests.support.tokenizer_kinds import DATA, WIDE, arrays, backend_ids, named, stored, wiki

TEXTS = ["The cat sat on the mat. ", "the other cat, naïve 中文 cats and other mats"] * 3


def model(tokenizer: JsonTokenizer) -> tuple[dict[str, int], list[list[str]]]:
    """Return the vocabulary and the merges in a tokenizer.json."""
    spec = json.loads(tokenizer.json_text)["model"]
    return spec["vocab"], spec["merges"]


def of_merges(pairs: list[tuple[str, str]]) -> JsonTokenizer:
    """Return a byte-level BPE laid out as GPT-2's: bytes, these merges, <|endoftext|>."""
    tokens = [*byte_letters().values(), *map("".join, pairs), END_OF_TEXT]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = byte_level_backend(models.BPE(vocab=vocab, merges=pairs))
    return JsonTokenizer(backend.to_str(), "gpt2", None, vocab[END_OF_TEXT])


@cache
def first_merges() -> JsonTokenizer:
    """Return GPT-2's tokenizer with its first 3,000 merges."""
    return of_merges([(left, right) for left, right in model(named("gpt2"))[1][:3000]])


@cache
def trimmed(size: int) -> JsonTokenizer:
    return trim_vocabulary(named("gpt2"), TEXTS, size)


def test_a_worked_example():
    """In "low lower low her", lo and low are made three times and er twice.

    The fourth merge, he, is never made: er goes first.
    """
    pairs = [("l", "o"), ("e", "r"), ("lo", "w"), ("h", "e")]
    small = of_merges(pairs)
    assert merge_counts([0, 0, 0, 0, 3], [(0, 1, 3), (3, 2, 4)]) == [3, 3]
    two = trim_vocabulary(small, ["low lower", " low her"], 256 + 2 + 1)
    assert model(two)[1] == [["l", "o"], ["lo", "w"]]
    assert [two.decode([i]) for i in two.encode("lower her")] == [*["low", "e", "r"], *" her"]
    assert (two.eos_id, two.bos_id, two.vocab_size) == (258, None, 259)
    three = trim_vocabulary(small, ["low lower", " low her"], 256 + 3 + 1)
    assert model(three)[1] == [["l", "o"], ["e", "r"], ["lo", "w"]]


def applied_merges(word: bytes, ranks: dict[tuple[bytes, bytes], int]) -> list[int]:
    """Return the merges that byte-pair encoding applies to a word, as its definition says."""
    parts, applied = [bytes([byte]) for byte in word], []
    while True:
        pairs = pairwise(parts)
        rank = min((ranks[pair] for pair in pairs if pair in ranks), default=None)
        if rank is None:
            return applied
        i = next(i for i in range(len(parts)) if ranks.get((*parts[i : i + 2],)) == rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        applied.append(rank)


def test_the_merges_kept_are_those_that_encoding_applies_most():
    texts = wiki()[:12]
    vocab, merges = model(first_merges())
    spelling = {token: first_merges().token_bytes(i) for token, i in vocab.items()}
    ranks = {(spelling[a], spelling[b]): rank for rank, (a, b) in enumerate(merges)}
    words = Counter(word for text in texts for word in regex.findall(GPT2_PATTERN, text))
    counts: Counter[int] = Counter()
    for word, n in words.items():
        for rank in applied_merges(word.encode(), ranks):
            counts[rank] += n
    most = sorted(range(len(merges)), key=lambda rank: (-counts[rank], rank))[:400]
    tokenizer = trim_vocabulary(first_merges(), texts, 256 + 400 + 1)
    assert model(tokenizer)[1] == [merges[rank] for rank in sorted(most)]
    dropped = counts.total() - sum(counts[rank] for rank in most)
    n_tokens = sum(len(first_merges().encode(text)) for text in texts)
    assert f"keeps the most used 400 of the {len(counts):,} merges" in tokenizer.note
    assert f"makes about {dropped / n_tokens:.1%} more tokens" in tokenizer.note


@pytest.mark.parametrize("size", [257, 258, 290, 2000])
def test_every_size_has_the_bytes_the_parts_of_each_merge_and_gpt2s_order(size):
    tokenizer = trim_vocabulary(first_merges(), TEXTS, size)
    vocab, merges = model(tokenizer)
    all_vocab, all_merges = model(first_merges())
    assert tokenizer.vocab_size == len(vocab) == size == len(merges) + 257
    assert tokenizer.name == f"gpt2:{size}"
    assert tokenizer.eos_id == vocab[END_OF_TEXT] == size - 1
    assert sorted(vocab, key=vocab.get) == sorted(vocab, key=all_vocab.get)
    assert sorted(vocab.values()) == list(range(size))
    made = set(byte_letters().values())
    for left, right in merges:
        assert {left, right} <= made
        made.add(left + right)
    assert made | {END_OF_TEXT} == vocab.keys()
    order = {tuple(pair): i for i, pair in enumerate(all_merges)}
    positions = [order[tuple(pair)] for pair in merges]
    assert positions == sorted(positions)


@pytest.mark.parametrize("size", [257, 290, 2000])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | WIDE)
def test_any_text_comes_back_and_both_libraries_agree(size, text):
    tokenizer = trimmed(size)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.fast_encoding is not None
    assert arrays(tokenizer, [text]) == [ids]


def test_every_byte_has_a_token_of_its_own():
    tokenizer = trimmed(257)
    assert [tokenizer.token_bytes(i) for i in range(257)] == [
        named("gpt2").token_bytes(i) for i in [*range(256), 50_256]
    ]


def test_a_word_whose_tokens_are_all_kept_is_encoded_as_by_gpt2():
    """The merges that lead to the kept tokens are kept, so encoding takes the same steps."""
    texts = wiki()[::100]
    tokenizer = trim_vocabulary(named("gpt2"), texts, 2000)
    kept = {*map(tokenizer.token_bytes, range(2000))}
    words = sorted({word for text in texts for word in regex.findall(GPT2_PATTERN, text)})
    alike = 0
    rows = zip(words, arrays(named("gpt2"), words), arrays(tokenizer, words), strict=True)
    for word, all_ids, ids in rows:
        tokens = [named("gpt2").token_bytes(i) for i in all_ids]
        if kept.issuperset(tokens):
            alike += 1
            assert [tokenizer.token_bytes(i) for i in ids] == tokens, word
    assert 0.1 < alike / len(words) < 0.9
    assert arrays(tokenizer, texts) == backend_ids(tokenizer, texts)


def test_a_text_that_uses_fewer_merges_is_filled_up_with_gpt2s_first():
    first = model(first_merges())[1]
    assert model(trim_vocabulary(first_merges(), [], 300))[1] == first[:43]
    tokenizer = trim_vocabulary(first_merges(), [" can"], 300)
    parts = [["Ġ", "c"], ["a", "n"], ["Ġc", "an"]]
    others = [pair for pair in first if pair not in parts][: 43 - 3]
    assert sorted(model(tokenizer)[1]) == sorted(parts + others)
    assert tokenizer.note == (
        "GPT-2 applies 3 of its merges to the training text; gpt2:300 keeps these and the first "
        "40 of the others"
    )


def test_only_the_documents_decide_and_neither_their_order_nor_the_batches(monkeypatch):
    texts = wiki()[:40]
    state = trim_vocabulary(first_merges(), texts, 600).state()
    assert trim_vocabulary(first_merges(), iter(texts[::-1]), 600).state() == state
    monkeypatch.setattr("pocketlm.tokenizer.trimming.BATCH_CHARACTERS", 5)
    assert list(text_batches(["abc", "de", "abcdef", "", "a"])) == [
        ["abc", "de"], ["abcdef"], ["", "a"],
    ]  # fmt: skip
    assert trim_vocabulary(first_merges(), texts, 600).state() == state
    assert trim_vocabulary(first_merges(), wiki()[40:80], 600).state() != state


def test_by_name_with_all_of_the_vocabulary_it_is_gpt2(monkeypatch):
    monkeypatch.setattr(JsonTokenizer, "gpt2", lambda data_dir: named("gpt2"))
    tokenizer = build_tokenizer("gpt2:50257", DATA, ["a"])
    assert tokenizer.state() == named("gpt2").state() | {"name": "gpt2:50257"}
    assert tokenizer.fingerprint == named("gpt2").fingerprint


@pytest.mark.parametrize("size", ["", "abc", "1e4", "-5", "256", "0", "50258", "16,384", " 300"])
def test_a_size_that_it_cannot_have_says_which_it_can(size):
    with pytest.raises(UserError) as error:
        build_tokenizer(f"gpt2:{size}", DATA, [])
    assert str(error.value) == (
        f"data.tokenizer 'gpt2:{size}': write gpt2:SIZE with a size from 257 to 50,257, "
        "for example gpt2:16384"
    )


@pytest.fixture
def small_gpt2(monkeypatch):
    """Trims GPT-2's first merges only, which takes less time."""
    monkeypatch.setattr(JsonTokenizer, "gpt2", lambda data_dir: first_merges())


@pytest.mark.usefixtures("small_gpt2")
def test_it_has_gpt2s_end_of_document_and_state_keeps_what_is_chosen():
    for eos, expected in ((None, [b"", b"a", b""]), (False, [b"a"])):
        tokenizer = build_tokenizer("gpt2:277", DATA, ["a"], None, eos)
        again = from_state(json.loads(json.dumps(tokenizer.state())))
        assert again.state() == pickle.loads(pickle.dumps(again)).state() == tokenizer.state()
        assert again.note == tokenizer.note != ""
        assert [again.token_bytes(i) for i in stored(again, ["a"])] == expected
        assert again.vocab_size == 277
    with pytest.raises(UserError, match="data.bos is true, but the tokenizer 'gpt2' has no such"):
        build_tokenizer("gpt2:277", DATA, ["a"], True, None)


@pytest.mark.usefixtures("small_gpt2")
def test_each_corpus_has_its_own_and_keeps_it(tmp_path, monkeypatch):
    paths = [tmp_path / "cats.txt", tmp_path / "dogs.txt"]
    for path in paths:
        path.write_text("".join(f"{path.stem} number {i}\n" for i in range(30)))
    configs = [
        byte_config(tmp_path, path=str(path), separator="line", tokenizer="gpt2:270", val_share=0.3)
        for path in paths
    ]
    cats, dogs = map(prepare, configs)
    assert cats.tokenizer.fingerprint != dogs.tokenizer.fingerprint
    lengths = [len(data.tokenizer.encode("cats number 7")) for data in (cats, dogs)]
    assert lengths[0] < lengths[1] < len("cats number 7")
    assert len([*Path(configs[0].cache_dir, "tokenizers").glob("*.json")]) == 2
    monkeypatch.setattr("pocketlm.data.prepare.build_tokenizer", None)
    assert prepare(configs[0]).tokenizer.state() == cats.tokenizer.state()
