"""Exported tokenizers: AutoTokenizer and our reader have our ids for any text."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import UserError
from pocketlm.export.huggingface import generation_values, write_json, write_tokenizer
from pocketlm.export.tokenizers import library_tokenizer
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.build import build_tokenizer
from tests.support.exports import a_checkpoint
from tests.support.pretrained import byte_level_bpe
from tests.support.tokenizer_kinds import DATA, ENDS, OWN, SYMBOLS

CAT = "the cat sat on the mat, the dog sat on the log. "
TEXT = [CAT, "中文中文 naïve 😀😀", *SYMBOLS]
KINDS = [*OWN, "gpt2", "gpt2:300", "json"]
# text that spells special tokens, white space of all kinds, and anything else
NASTY = st.lists(
    st.sampled_from(["<|endoftext|>", "<|beginoftext|>", "<unk>", "<s>", " ", "\r\n", "\u3000"])
    | st.text(max_size=8)
    | st.text(SYMBOLS + "the cat", max_size=8),
    max_size=6,
).map("".join)


@cache
def tokenizer_of(kind: str, bos: bool | None = None, eos: bool | None = None) -> Tokenizer:
    if kind == "json":
        return JsonTokenizer(byte_level_bpe("smollm").to_str(), "json", 0, 1)
    return build_tokenizer(kind, DATA, TEXT, bos, eos)


@cache
def exported_to(tokenizer: Tokenizer) -> Path:
    """Write the tokenizer as in a folder, without a model."""
    folder = Path(mkdtemp())
    checkpoint = load_checkpoint(a_checkpoint(folder, tokenizer=tokenizer))
    library = library_tokenizer(tokenizer)
    write_tokenizer(library, checkpoint, folder)
    write_json(generation_values(library), folder / "generation_config.json")
    write_json({"model_type": "llama"} | generation_values(library), folder / "config.json")
    return folder


@cache
def auto(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(exported_to(tokenizer))


def ids_or_none(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Return the ids; None if the text has a byte without one."""
    try:
        return tokenizer.encode(text)
    except UserError:
        return None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=NASTY)
def test_auto_tokenizer_has_our_ids_after_what_stands_before_a_document(
    kind: str, text: str
) -> None:
    tokenizer = tokenizer_of(kind)
    ids = ids_or_none(tokenizer, text)
    if ids is not None:
        assert auto(tokenizer).encode(text, add_special_tokens=False) == ids
        assert auto(tokenizer).encode(text) == tokenizer.document_prefix + ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(text=NASTY)
def test_text_comes_back_from_its_ids(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = ids_or_none(tokenizer, text)
    if ids is not None and tokenizer.decode(ids) == text and tokenizer.unk_id not in ids:
        assert auto(tokenizer).decode(ids) == text


@pytest.mark.parametrize("bos, eos", ENDS)
@pytest.mark.parametrize("kind", OWN)
def test_a_tokenizer_read_again_opens_and_ends_documents_alike(
    kind: str, bos: bool, eos: bool
) -> None:
    tokenizer = tokenizer_of(kind, bos, eos)
    again = JsonTokenizer.from_file(exported_to(tokenizer))
    assert again.encode(CAT) == tokenizer.encode(CAT)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert again.document_prefix == tokenizer.document_prefix
    assert again.document_suffix == tokenizer.document_suffix
    assert again.corpus_suffix == tokenizer.corpus_suffix
    seen = "the cat sat on "
    assert again.decode(tokenizer.encode(seen)) == tokenizer.decode(tokenizer.encode(seen))
