"""Vocabulary trimming: GPT-2's byte-pair encoding with only the merges that a corpus uses most.

Encoding a text applies merges: "l" and "o" become "lo", "lo" and "w" become "low". Without the last
merge, each "low" is the two tokens "lo" and "w", so a merge saves one token each time it is
applied. `merge_counts` counts that for every merge over the training documents, and the merges with
the highest counts stay. Both parts of a token are made at least as often as the token, therefore
every merge that stays has its parts, and what stays is a byte-pair encoding with GPT-2's splitting
and GPT-2's order of merges. It has every byte, so it encodes any text.

Trimming a vocabulary to a corpus is a known technique: for translation, Cognetta et al. 2024
(arXiv:2404.00397) replace rare tokens by their parts; for one language of a multilingual model,
Ushio et al. 2023 (arXiv:2305.15020) drop the tokens that the language does not use.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import models

from pocketlm.tokenizer.bpe import JsonTokenizer, byte_level_backend
from pocketlm.tokenizer.tiktoken_backend import merged_tokens

BATCH_CHARACTERS = 2**20  # of the training text, encoded at once


def trim_vocabulary(
    tokenizer: JsonTokenizer, texts: Iterable[str], vocab_size: int
) -> JsonTokenizer:
    """Return GPT-2's tokenizer with the `vocab_size` tokens that encode `texts` best.

    They are the bytes, <|endoftext|> and the merges applied most; of equals, such as those that are
    never applied, GPT-2's first. Ids keep GPT-2's order. `texts` are read once.
    """
    spec = json.loads(tokenizer.json_text)
    vocab, merges, tokens = spec["model"]["vocab"], spec["model"]["merges"], merged_tokens(spec)
    n_kept = vocab_size - (len(vocab) - len(merges))
    name = f"{tokenizer.name}:{vocab_size}"
    if n_kept == len(merges):
        return JsonTokenizer(tokenizer.json_text, name, tokenizer.bos_id, tokenizer.eos_id)
    counts = token_counts(tokenizer, texts)
    steps = [(vocab[left], vocab[right], vocab[left + right]) for left, right in merges]
    applied = np.array(merge_counts(counts.tolist(), steps), np.int64)
    by_use = np.argsort(-applied, kind="stable")
    kept, dropped = sorted(by_use[:n_kept].tolist()), by_use[n_kept:]
    gone = {tokens[i] for i in dropped.tolist()}
    remaining = [token for token in sorted(vocab, key=vocab.__getitem__) if token not in gone]
    backend = byte_level_backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(remaining)},
            merges=[(merges[i][0], merges[i][1]) for i in kept],
        )
    )
    new_ids: dict[int | None, int] = {vocab[token]: i for i, token in enumerate(remaining)}
    bos_id, eos_id = new_ids.get(tokenizer.bos_id), new_ids.get(tokenizer.eos_id)
    used, extra = int((applied > 0).sum()), int(applied[dropped].sum()) / max(1, counts.sum())
    note = trimming_note(name, n_kept, used, extra)
    return JsonTokenizer(backend.to_str(), name, bos_id, eos_id, note)


def trimming_note(name: str, n_kept: int, used: int, extra: float) -> str:
    """Return a sentence on the merges that were kept, of the `used` ones, and on their cost."""
    if used <= n_kept:
        return (
            f"GPT-2 applies {used:,} of its merges to the training text; {name} keeps these and "
            f"the first {n_kept - used:,} of the others"
        )
    return (
        f"{name} keeps the most used {n_kept:,} of the {used:,} merges that GPT-2 applies to the "
        f"training text, which makes about {extra:.1%} more tokens of it than gpt2"
    )


def merge_counts(counts: Sequence[int], steps: Sequence[tuple[int, int, int]]) -> list[int]:
    """Return how often each merge was applied in a text that has `counts` of each token.

    A merge is (left, right, merged) ids, and comes after those that make its parts.

    >>> merge_counts([9, 9, 9, 1, 5], [(0, 1, 3), (3, 2, 4)])  # l o w lo low
    [6, 5]
    """
    made = [*counts]
    for left, right, merged in reversed(steps):
        made[left] += made[merged]
        made[right] += made[merged]
    return [made[merged] for _, _, merged in steps]


def token_counts(tokenizer: JsonTokenizer, texts: Iterable[str]) -> NDArray[Any]:
    """Return the number of occurrences of each id in the texts, shape (vocabulary,)."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for batch in text_batches(texts):
        for row in tokenizer.encode_arrays(batch):
            counts += np.bincount(row, minlength=len(counts))
    return counts


def text_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of texts of BATCH_CHARACTERS or, the last one, fewer."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
