"""Tokenizers of every kind, and their results in a form that tests compare."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import tokenizers as hf
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from pocketlm.corpus.named import CORPORA
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.build import build_tokenizer

DATA = Path(__file__).parents[2] / "data"
SYMBOLS = "abc \n.éß中文😀\ufffd"
WIDE = st.text(alphabet="aé中文字😀🏳️‍🌈 \n", max_size=30)  # characters of one to four bytes
KINDS = ["byte", "char", "bpe:300", "gpt2"]
BYTE_LEVEL = ["byte", "bpe:300", "gpt2"]
OWN = ["byte", "seen-bytes", "char", "char:20", "bpe:300"]  # a config may choose their bos and eos
ENDS = [(True, True), (False, True), (True, False), (False, False)]


@cache
def named(name: str) -> Tokenizer:
    """Return a tokenizer by its name, trained on a little text if it is of a trained kind."""
    cat = "the cat sat on the mat, the dog sat on the log. " * 5
    texts = {"char": list(SYMBOLS), "bpe:300": [cat, "中文中文 naïve 😀😀"]}
    return build_tokenizer(name, DATA, texts.get(name, []))


def arrays(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the result of encode_arrays as lists; assert that it has the tokenizer's dtype."""
    rows = tokenizer.encode_arrays(texts)
    assert {row.dtype for row in rows} <= {np.dtype(tokenizer.dtype)}
    return [row.tolist() for row in rows]


def backend_ids(tokenizer: JsonTokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids that the `tokenizers` library gives."""
    encodings = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def stored(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """Return the ids of a corpus of these documents."""
    ids = []
    for text in texts:
        ids += tokenizer.document_prefix + tokenizer.encode(text) + tokenizer.document_suffix
    return ids + tokenizer.corpus_suffix


def word_level(folder: Path, vocab: dict[str, int], **config: str) -> Path:
    """Write a word-level tokenizer.json, and a tokenizer_config.json of `config`, to a folder."""
    backend = hf.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def wiki() -> list[str]:
    """Return the summaries of the corpus `wiki`."""
    return list(CORPORA["wiki"](str(DATA)))


@cache
def trained() -> JsonTokenizer:
    """Return a BPE trained on prose and code, with merges of a real vocabulary."""
    code = "\n\n\n    if x:\t\t\u3000\u3000y  \r\n\r\n" * 1000
    return JsonTokenizer.train_bpe([*wiki()[::20], code], 2000)


def changed(tokenizer: JsonTokenizer, change: Callable[[hf.Tokenizer], object]) -> JsonTokenizer:
    """Return a copy of the tokenizer whose backend has been changed."""
    backend = hf.Tokenizer.from_str(tokenizer.json_text)
    change(backend)
    return JsonTokenizer(backend.to_str(), "changed", None, None)
