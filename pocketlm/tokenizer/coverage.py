"""Coverage of a text by its tokens: the characters for which there is no token.

A BPE without an unknown token leaves such a character out, and a splitter may leave out the spaces
between words. Models of other types without an unknown token fail.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers as hf
from tokenizers import models, processors


class Coverage:
    """The characters that a tokenizer.json leaves out of a text."""

    def __init__(self, json_text: str):
        self.backend = hf.Tokenizer.from_str(json_text)
        model = self.backend.model
        self.model_leaves_out = isinstance(model, models.BPE) and model.unk_token is None
        # a token for each word: a BPE's offsets are wrong behind a character that it leaves out
        self.splitter = hf.Tokenizer.from_str(json_text)
        self.splitter.encode_special_tokens = True
        self.splitter.model = models.WordLevel({"word": 0}, unk_token="word")
        self.splitter.post_processor = processors.Sequence([])  # it may trim offsets
        self.has_tokens: dict[str, bool] = {}

    def left_out(self, text: str) -> Counter[str]:
        """Return the characters of the text that no token stands for, counted.

        The splitting into words leaves some out, such as spaces, and the model others.
        """
        depths = np.zeros(len(text) + 1, np.int64)
        for start, end in self.splitter.encode(text, add_special_tokens=False).offsets:
            depths[start] += 1
            depths[end] -= 1
        covered = np.cumsum(depths[:-1]) > 0
        left_out = Counter(text[i] for i in np.flatnonzero(~covered).tolist())
        if self.model_leaves_out:
            in_words = Counter(text) - left_out
            left_out.update({c: n for c, n in in_words.items() if not self.has_token(c)})
        return left_out

    def has_token(self, character: str) -> bool:
        """Return whether a character has a token, or may have one within a text only."""
        if character not in self.has_tokens:
            normalizer = self.backend.normalizer
            stripped = normalizer and not normalizer.normalize_str(character)
            ids = self.backend.encode(character, add_special_tokens=False).ids
            self.has_tokens[character] = bool(stripped or ids)
        return self.has_tokens[character]


def unencodable_part(encode: Callable[[str], Any], text: str) -> str:
    """Return the first word of the text that `encode` refuses, or the character that is to blame.

    >>> unencodable_part(lambda text: text.encode("ascii"), "a naïve word")
    'ï'
    """
    for word in text.split() or [text]:
        if is_refused(encode, word):
            characters = dict.fromkeys(word)
            refused = [one for one in characters if is_refused(encode, one)]
            return refused[0] if 0 < len(refused) < len(characters) else word
    return text


def is_refused(encode: Callable[[str], Any], text: str) -> bool:
    """Return whether `encode` fails for the text."""
    try:
        encode(text)
    except Exception:  # the library raises the bare class
        return True
    return False
