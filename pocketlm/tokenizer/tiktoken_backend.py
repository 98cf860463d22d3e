"""tiktoken backend: an equal byte-pair encoding that encodes a corpus four times as fast.

tiktoken has no list of merges: it joins any two neighbours that together spell a token, the lowest
id first. `equivalent_tiktoken` returns an encoding only if that gives the same ids.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers as hf
from numpy.typing import NDArray

from pocketlm.tokenizer.streaming import letter_bytes

if TYPE_CHECKING:
    import tiktoken

# joins the texts of one call of tiktoken, which reads it as a special token; both letters are of
# Unicode's private use area
SEPARATOR = "\ue000|\ue001"

# GPT-2's pattern with possessive quantifiers, which never backtrack
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# options of the library's BPE that tiktoken lacks
UNSUPPORTED_OPTIONS = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "ignore_merges",
)


def equivalent_tiktoken(backend: hf.Tokenizer, name: str) -> "tiktoken.Encoding | None":
    """Return the tiktoken encoding that gives the same ids as `backend`; None if there is none."""
    spec = json.loads(backend.to_str())  # this has every key; a file may lack some
    if not encodes_like_gpt2(spec) or not merges_follow_ids(backend, spec):
        return None
    import tiktoken  # only the preparation of a corpus needs it

    vocab, bytes_of = spec["model"]["vocab"], letter_bytes()
    ranks = {}
    for token in [*bytes_of, *merged_tokens(spec)]:
        ranks[bytes(bytes_of[letter] for letter in token)] = vocab[token]
    separator_id = max(backend.get_vocab().values()) + 1
    return tiktoken.Encoding(
        name,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={SEPARATOR: separator_id},
    )


def encodes_like_gpt2(spec: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json has GPT-2's splitting and no option that tiktoken lacks."""
    model, splitter = spec["model"], spec["pre_tokenizer"] or {}
    if model["type"] != "BPE" or splitter.get("type") != "ByteLevel":
        return False
    if not splitter["use_regex"] or splitter["add_prefix_space"] or spec["normalizer"] is not None:
        return False
    if not all(token["special"] for token in spec["added_tokens"]):
        return False
    return not any(model[option] for option in UNSUPPORTED_OPTIONS)


def merged_tokens(spec: dict[str, Any]) -> list[str]:
    """Return the tokens that the merges make, in the order of the merges."""
    return ["".join(pair) for pair in spec["model"]["merges"]]


def merges_follow_ids(backend: hf.Tokenizer, spec: dict[str, Any]) -> bool:
    """Return whether joining neighbours by the lowest id is the same as applying the merges.

    It is if the ids are in the order of the merges, every byte has an id, and the letters of each
    token merge into that token.
    """
    vocab, letters = spec["model"]["vocab"], letter_bytes().keys()
    tokens = merged_tokens(spec)
    ids = [vocab[token] for token in tokens]
    if ids != sorted(set(ids)):
        return False
    if not letters <= vocab.keys() or not letters >= set().union(*tokens):
        return False
    return all(
        [part.value for part in backend.model.tokenize(token)] == [token] for token in tokens
    )


def encode_texts(encoding: "tiktoken.Encoding", texts: list[str], dtype: str) -> list[NDArray[Any]]:
    """Return the ids of each text.

    All texts are joined for one call: each call acquires Python's global lock, for which the
    threads compete.
    """
    joined = SEPARATOR.join(texts)
    if joined.count(SEPARATOR) >= len(texts):  # one of the texts contains the separator
        rows = [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return [row.astype(dtype) for row in rows]
    ids = encoding.encode_to_numpy(joined, allowed_special={SEPARATOR})
    borders = np.flatnonzero(ids == encoding.encode_single_token(SEPARATOR)).tolist()
    starts, ends = [0, *(border + 1 for border in borders)], [*borders, len(ids)]
    return [ids[start:end].astype(dtype) for start, end in zip(starts, ends, strict=True)]


def may_have_wide_gap(text: str) -> bool:
    """Return True if there are 2**17 or more white-space characters in a row.

    It is also True for some texts with fewer. A gap of a million overflows the stack of tiktoken's
    pattern matcher.
    """
    return any(text[i : i + 2**16].isspace() for i in range(0, len(text) - 2**15, 2**16))
