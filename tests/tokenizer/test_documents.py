"""The special tokens around documents."""

import pickle

import pytest
import tokenizers as hf
from tokenizers import models, pre_tokenizers

from pocketlm.errors import UserError
from pocketlm.tokenizer.build import build_tokenizer
from tests.support.tokenizer_kinds import (
    BYTE_LEVEL,
    DATA,
    ENDS,
    OWN,
    SYMBOLS,
    arrays,
    backend_ids,
    named,
    stored,
    word_level,
)


@pytest.mark.parametrize(
    "kind, eos", [("byte", 256), ("char", 1), ("bpe:300", 0), ("gpt2", 50_256)]
)
def test_eos_alone_ends_every_document_and_opens_every_prompt(kind, eos):
    tokenizer = named(kind)
    a, b = tokenizer.encode("ab"), tokenizer.encode("c")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, eos)
    assert stored(tokenizer, ["ab", "c"]) == [eos, *a, eos, *b, eos]
    assert tokenizer.decode(stored(tokenizer, ["ab", "c"])) == "abc"


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("bos, eos", ENDS)
def test_documents_between_every_choice_of_ends(kind, bos, eos):
    tokenizer = build_tokenizer(kind, DATA, [SYMBOLS], bos, eos)
    a, b = tokenizer.encode("ab"), tokenizer.encode("c")
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    assert (begin is not None, end is not None) == (bos, eos)
    expected = {
        (True, True): [begin, *a, end, begin, *b, end],
        (True, False): [begin, *a, begin, *b],
        (False, True): [end, *a, end, *b, end],
        (False, False): [*a, *b],
    }[bos, eos]
    assert stored(tokenizer, ["ab", "c"]) == expected
    assert tokenizer.decode(expected) == "abc"
    assert not {begin, end} & {*tokenizer.encode(SYMBOLS)}
    assert begin is None or begin != end
    assert (
        max(i for i in (begin, end, *tokenizer.encode(SYMBOLS)) if i is not None)
        < tokenizer.vocab_size
    )


def test_null_is_what_the_tokenizer_has(tmp_path):
    """`bos` and `eos` of a config are true, false or null."""
    folder = str(
        word_level(tmp_path, {"?": 0, "[B]": 1, "[E]": 2, "a": 3}, bos_token="[B]", eos_token="[E]")
    )
    ends = {
        (b, e): (t.bos_id, t.eos_id)
        for b in (None, True, False)
        for e in (None, True, False)
        for t in [build_tokenizer(folder, DATA, (), b, e)]
    }
    assert ends == {(b, e): (None if b is False else 1, None if e is False else 2) for b, e in ends}
    assert len(ends) == 9
    assert [
        build_tokenizer(kind, DATA, ["a"]).document_prefix for kind in ("byte", "char", "bpe:258")
    ] == [
        [256],
        [1],
        [0],
    ]
    assert build_tokenizer("gpt2", DATA, (), None, False).document_prefix == []


@pytest.mark.parametrize(
    "bos, eos, key", [(True, None, "bos"), (None, True, "eos"), (True, True, "bos")]
)
def test_an_end_that_the_tokenizer_has_not_is_a_user_error(tmp_path, bos, eos, key):
    folder = str(word_level(tmp_path, {"?": 0, "a": 1}))
    with pytest.raises(
        UserError, match=rf"data\.{key} is true, but the tokenizer .* has no such token"
    ):
        build_tokenizer(folder, DATA, (), bos, eos)


def test_with_bos_eos_changes_no_other_id():
    bare = named("gpt2").with_bos_eos(None, False)
    assert bare.encode("one two") == named("gpt2").encode("one two")
    assert (bare.document_prefix, bare.document_suffix, bare.corpus_suffix, bare.vocab_size) == (
        [],
        [],
        [],
        50_257,
    )
    assert named("gpt2").with_bos_eos(None, None).fingerprint == named("gpt2").fingerprint


def test_a_folders_tokens_of_begin_and_end_surround_a_document(tmp_path):
    folder = word_level(
        tmp_path,
        {"?": 0, "[B]": 1, "[E]": 2, "a": 3, "b": 4},
        bos_token="[B]",
        eos_token={"content": "[E]"},
    )
    for name in (folder, folder / "tokenizer.json"):
        tokenizer = build_tokenizer(str(name), DATA)
        assert stored(tokenizer, ["b a", "b"]) == [1, 4, 3, 2, 1, 4, 2]
        assert tokenizer.name == str(name)


def test_one_token_for_begin_and_end_stands_once_between_documents(tmp_path):
    """The folders of GPT-2 and similar models are so."""
    folder = word_level(tmp_path, {"?": 0, "[X]": 1, "a": 2}, bos_token="[X]", eos_token="[X]")
    assert stored(build_tokenizer(str(folder), DATA), ["a", "a a"]) == [1, 2, 1, 2, 2, 1]


def test_a_tokenizer_json_alone_is_searched_for_the_usual_names(tmp_path):
    tokenizer = build_tokenizer(
        str(word_level(tmp_path, {"?": 0, "<s>": 1, "</s>": 2, "a": 3})), DATA
    )
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    (tmp_path / "plain").mkdir()
    tokenizer = build_tokenizer(str(word_level(tmp_path / "plain", {"?": 0, "a": 1})), DATA)
    assert stored(tokenizer, ["a", "a"]) == [1, 1]


def test_ids_with_gaps_count_to_the_highest(tmp_path):
    """An embedding has a row for every id up to the highest, even if some of them have no text."""
    assert build_tokenizer(str(word_level(tmp_path, {"?": 0, "a": 7})), DATA).vocab_size == 8


def test_a_tokenizer_json_that_truncates_and_pads_does_neither_here(tmp_path):
    """With the settings of a file's last use, documents would silently lose their ends."""
    backend = hf.Tokenizer.from_str(named("gpt2").json_text)
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_id=50_256, pad_token="<|endoftext|>")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(str(tmp_path), DATA)
    text = "one two three four five six"
    assert tokenizer.encode(text) == named("gpt2").encode(text)
    assert arrays(tokenizer, [text, "one"]) == arrays(named("gpt2"), [text, "one"])
    assert backend_ids(tokenizer, [text, "one"]) == arrays(named("gpt2"), [text, "one"])


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_the_text_of_a_special_token_stays_text(kind):
    text = "a <|endoftext|><|endoftext|> b"
    copy = pickle.loads(pickle.dumps(named(kind)))  # as a data worker has it
    for ids in (
        named(kind).encode(text),
        *arrays(named(kind), [text]),
        copy.encode(text),
        *arrays(copy, [text]),
    ):
        assert named(kind).eos_id not in ids
        assert ids == named(kind).encode(text)
        assert named(kind).decode(ids) == text


@pytest.mark.parametrize("normalized", [False, True])
def test_the_text_of_a_special_token_stays_text_in_a_tokenizer_without_a_fast_path(
    tmp_path, normalized
):
    backend = hf.Tokenizer(
        models.WordLevel({"?": 0, "<s>": 1, "<": 2, "s": 3, ">": 4}, unk_token="?")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([hf.AddedToken("<s>", normalized=normalized)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(str(tmp_path), DATA)
    assert tokenizer.bos_id == 1
    assert tokenizer.fast_encoding is None
    assert arrays(tokenizer, ["<s>s"]) == [tokenizer.encode("<s>s")] == [[2, 3, 4, 3]]
    assert pickle.loads(pickle.dumps(tokenizer)).encode("<s>s") == [2, 3, 4, 3]
