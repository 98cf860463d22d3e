"""Coverage: characters for which a tokenizer has no token are counted, or refused by name."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from pocketlm.errors import UserError
from pocketlm.inference.generate import describe_left_out
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz."
VOCAB = {letter: i for i, letter in enumerate(LETTERS)}
BYTES = {f"<0x{byte:02X}>": 300 + byte for byte in range(256)}


def tokenizer_of(backend: hf.Tokenizer) -> JsonTokenizer:
    return JsonTokenizer(backend.to_str(), "mine", None, None)


def without_unk(**options: object) -> hf.Tokenizer:
    backend = hf.Tokenizer(models.BPE(vocab=VOCAB, merges=[], **options))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def left_out(tokenizer: Tokenizer, text: str) -> Counter[str]:
    (row,) = tokenizer.encode_arrays([text])
    return tokenizer.left_out_characters(text, row)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from(LETTERS + " \nдом강😀é"), max_size=20))
def test_characters_without_an_entry_and_spaces_are_left_out(text):
    """The tokens are letters, so that what is not one of them has vanished."""
    assert left_out(tokenizer_of(without_unk()), text) == Counter(
        character for character in text if character not in LETTERS
    )


@pytest.mark.parametrize("text, expected", [
    (" a b ", {" ": 3}), ("é", {"é": 1}), ("aéb ", {"é": 1, " ": 1}), ("abc", {}),
])  # fmt: skip
@pytest.mark.parametrize("strip", [False, True])
def test_spaces_of_a_model_that_sees_the_whole_text_are_counted_too(text, expected, strip):
    backend = without_unk()
    backend.pre_tokenizer = None
    if strip:  # a space alone has no text then, so that nothing is known of one within a text
        backend.normalizer = normalizers.Strip()
        expected = {c: n - text.strip().count(" ") * (c == " ") for c, n in expected.items()}
    assert left_out(tokenizer_of(backend), text) == Counter(expected)


@pytest.mark.parametrize("text", ["река the", "강 of 1", "", " ", "fish 😀"])
def test_unknown_tokens_and_bytes_leave_nothing_out(text):
    unknown = without_unk(unk_token="a", fuse_unk=True)
    unknown.pre_tokenizer = None
    fallback = hf.Tokenizer(models.BPE(vocab=VOCAB | BYTES, merges=[], byte_fallback=True))
    fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for backend in (unknown, fallback):
        assert left_out(tokenizer_of(backend), text) == Counter()


def test_a_changed_text_is_not_left_out():
    """Lower case and compatibility forms stand for their characters; what is stripped does not."""
    backend = without_unk()
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("x", "")]
    )
    assert left_out(tokenizer_of(backend), "The ﬁsh x") == Counter({" ": 2, "x": 1})


def test_spaces_that_a_processor_trims_from_the_offsets_are_in_their_tokens():
    backend = hf.Tokenizer(
        models.BPE(vocab={"Ġ": 0, **{c: i + 1 for c, i in VOCAB.items()}}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.normalizer = normalizers.Lowercase()
    assert left_out(tokenizer_of(backend), "The fish") == Counter()


def test_the_unknown_token_of_a_unigram_model_is_found():
    """It is an index into the pieces; the report said that no token was unknown."""
    pieces = [("<s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = tokenizer_of(hf.Tokenizer(models.Unigram(pieces, 1)))
    assert tokenizer.unk_id == 1
    (row,) = tokenizer.encode_arrays(["aдомb"])
    assert np.count_nonzero(row == tokenizer.unk_id) == 1  # neighbours are one
    assert tokenizer_of(hf.Tokenizer(models.Unigram(pieces, None))).unk_id is None


WORDS = {"the": 0, "river": 1}


@pytest.mark.parametrize("model, part", [
    (models.WordLevel(WORDS, unk_token="[UNK]"), "'zebra'"),
    (models.WordPiece(WORDS, unk_token="[UNK]"), "'zebra'"),
    (models.Unigram([(letter, -3.0) for letter in "ther iv"], None), "'z'"),
], ids=["WordLevel", "WordPiece", "Unigram"])  # fmt: skip
def test_a_word_without_an_entry_is_refused_by_name(model, part):
    backend = hf.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tokenizer_of(backend)
    assert len(tokenizer.encode("the river")) == len(tokenizer.encode_arrays(["the river"])[0])
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_arrays(["the river", text])):
        with pytest.raises(UserError) as error:
            encode("the river the zebra")
        assert f"the tokenizer 'mine' has no entry for {part}" in str(error.value)
        assert "'the river the zebra'" in str(error.value)


def test_an_error_that_is_not_about_an_entry_stays_what_it_is():
    with pytest.raises((UnicodeError, TypeError)):
        tokenizer_of(without_unk()).encode("\udcff")


def test_an_empty_vocabulary_is_refused_by_its_path(tmp_path):
    hf.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=f"the tokenizer '{tmp_path}' has an empty vocabulary"):
        JsonTokenizer.from_file(Path(tmp_path))


def test_the_characters_of_a_prompt_without_a_token_are_named():
    tokenizer = tokenizer_of(without_unk())
    assert describe_left_out(tokenizer, "a b") == ""  # a space that is left out separates words
    assert "'mine' has no token for 'д', '€'" in describe_left_out(tokenizer, "a д€b")
