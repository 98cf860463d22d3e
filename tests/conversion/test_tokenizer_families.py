"""The tokenizers of Llama's relatives have transformers' ids for any text."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend

from pocketlm.tokenizer.bpe import JsonTokenizer
from tests.support.tokenizer_families import TOKENIZERS, write_tokenizer

# what the families split in different ways, and text that spells special tokens
PIECES = ["'s", "'LL", "12", "2024", "  ", " \n", "\r\n\n", "\t", "...", "e\u0301", "한", "\u3000"]
SPECIAL = ["<|im_end|>", "<|begin_of_text|>", "<s>", "<unk>", "<0x41>", "\u2581"]
TEXTS = st.lists(st.sampled_from([*PIECES, *SPECIAL, "fox", " over"]) | st.text(max_size=5)).map(
    "".join
)

# Families whose class of transformers 5 does not read the splitting in tokenizer.json, but has one
# of its own: GPT2Tokenizer's is not SmolLM's of digits, and LlamaTokenizer puts no space before
# another as SentencePiece does. Version 4 read the file, as the general class does in both.
REBUILT = ("smollm", "tinyllama")


@cache
def both(name: str) -> tuple[JsonTokenizer, PreTrainedTokenizerBase]:
    """Return the tokenizer of a folder as this program and as transformers reads it."""
    folder = write_tokenizer(name, Path(mkdtemp()))
    (folder / "config.json").write_text(json.dumps({"model_type": TOKENIZERS[name][0]}))
    reader = TokenizersBackend if name in REBUILT else AutoTokenizer
    return JsonTokenizer.from_file(folder), reader.from_pretrained(folder)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_ids_and_what_stands_before_a_text_are_those_of_transformers(name: str, text: str) -> None:
    ours, theirs = both(name)
    ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ours.encode(text) == ids
    before = theirs.encode(text, split_special_tokens=True)
    assert (ours.document_prefix if ours.special.adds_bos else []) + ids == before
