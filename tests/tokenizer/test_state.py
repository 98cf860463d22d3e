"""The state that a checkpoint carries, copies of it, and the fingerprint."""

import json
import pickle

import pytest

from pocketlm.tokenizer.build import build_tokenizer, from_state
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.tokenizer_kinds import DATA, ENDS, KINDS, OWN, SYMBOLS, named, stored, word_level


def test_state_through_json_gives_the_same_tokenizer(tokenizer):
    again = from_state(json.loads(json.dumps(tokenizer.state())))
    text = "the cat <|endoftext|> é中文😀 abc\n"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.fingerprint == tokenizer.fingerprint
    for name in (
        "name",
        "kind",
        "vocab_size",
        "dtype",
        "bos_id",
        "eos_id",
        "unk_id",
        "document_prefix",
        "document_suffix",
        "corpus_suffix",
    ):
        assert getattr(again, name) == getattr(tokenizer, name)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("bos, eos", ENDS)
def test_the_ends_go_through_state_and_pickle(kind, bos, eos):
    tokenizer = build_tokenizer(kind, DATA, [SYMBOLS], bos, eos)
    for again in (
        from_state(json.loads(json.dumps(tokenizer.state()))),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert stored(again, ["ab", "中"]) == stored(tokenizer, ["ab", "中"])
        assert (again.vocab_size, again.fingerprint, again.state()) == (
            tokenizer.vocab_size,
            tokenizer.fingerprint,
            tokenizer.state(),
        )


def test_other_ends_have_another_fingerprint(tmp_path):
    folder = str(
        word_level(tmp_path, {"?": 0, "[B]": 1, "[E]": 2, "a": 3}, bos_token="[B]", eos_token="[E]")
    )
    for kind in (*OWN, folder):
        assert (
            len({build_tokenizer(kind, DATA, [SYMBOLS], bos, eos).fingerprint for bos, eos in ENDS})
            == 4
        )


def test_a_state_without_ends_is_of_the_time_when_eos_was_the_only_one():
    assert from_state({"kind": "byte", "name": "byte"}).state() == ByteTokenizer().state()
    assert (
        from_state({"kind": "char", "name": "char", "symbols": "ab"}).state()
        == CharTokenizer("ab").state()
    )
    assert stored(from_state({"kind": "char", "name": "char", "symbols": "ab"}), ["ab"]) == [
        1,
        2,
        3,
        1,
    ]


def test_the_fingerprint_is_of_what_decides_the_ids():
    state = named("bpe:300").state()
    assert from_state({**state, "name": "other"}).fingerprint == named("bpe:300").fingerprint
    assert from_state({**state, "eos_id": 1}).fingerprint != named("bpe:300").fingerprint
    vocab = json.loads(state["json"])
    vocab["model"]["merges"].pop()
    assert (
        from_state({**state, "json": json.dumps(vocab)}).fingerprint != named("bpe:300").fingerprint
    )
    assert CharTokenizer("ab").fingerprint != CharTokenizer("abc").fingerprint
    assert len({named(kind).fingerprint for kind in KINDS}) == len(KINDS)
