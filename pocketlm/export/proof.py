"""The proof of a conversion: the logits and the greedy text of both models are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model import KVCache, Transformer
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer

Array = NDArray[Any]
# One forward pass: ids (B, T) and the cache of the tokens before them, or None at the start, to the
# logits (B, T, V) and the new cache.
Step = Callable[[Array, Any], tuple[Array, Any]]

GREEDY_TOKENS = 64
PROMPT_TOKENS = 8
TOKENS = 32  # of the rows whose logits are compared
CACHE_TOKENS = GREEDY_TOKENS + TOKENS  # all that are in a cache
# Sums of float32 in another order differ by some 1e-6 of the largest term.
TOLERANCE = 1e-5

# texts whose ids are compared
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces,\ttabs\n\n\nand lines \r\n ",
    "It's 31,415 o'clock; they'll say: «¡Qué día!»",
    "naïve cafe\u0301, 안녕하세요, 中文字, ﷽",
    "🙂🏳️‍🌈👩‍👩‍👧 \u200b\u00a0\u3000\ufeff",
    "<|endoftext|> and <|beginoftext|>, <unk> and <s> are text",
    "def f(x):\n    return x ** 2  # 100\n",
    "a",
    "",
)


@dataclass(frozen=True)
class Reference:
    """Logits, greedy tokens and token ids of a model, to compare a converted one with."""

    ids: Array  # (2, T)
    logits: Array  # (2, T, V)
    greedy: Array  # (n,): continuation of the first PROMPT_TOKENS of the first row

    @property
    def tolerance(self) -> float:
        """Largest difference of a logit that rounding explains; 1e-4 for those up to 10."""
        return TOLERANCE * max(10.0, float(np.abs(self.logits).max()))


@dataclass(frozen=True)
class Parity:
    """Agreement of a converted model with its reference."""

    difference: float  # largest, of any logit
    agreed: int  # greedy tokens before the first that differs
    n_tokens: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.1e}, "
            f"greedy {self.agreed} of {self.n_tokens} tokens"
        )


def our_step(model: Transformer) -> Step:
    """Return the forward pass of a model."""

    @torch.inference_mode()
    def step(ids: Array, cache: KVCache | None) -> tuple[Array, KVCache]:
        if cache is None:
            where: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
            length = min(model.max_seq_len, CACHE_TOKENS)
            cache = KVCache(model.config, len(ids), length, **where)
        logits = model(torch.from_numpy(ids).to(model.device), cache=cache)
        return logits.float().cpu().numpy(), cache

    return step


def reference_of(model: Transformer) -> Reference:
    """Return the logits of random ids, and a greedy continuation as far as the context allows.

    The ids are the same for each model of the same sizes.
    """
    vocab_size = model.config.vocab_size
    assert vocab_size is not None
    shape = (2, min(TOKENS, model.max_seq_len))
    ids = np.random.default_rng(0).integers(vocab_size, size=shape)
    logits, _ = our_step(model)(ids, None)
    prompt = prompt_of(ids)
    n_tokens = max(0, min(GREEDY_TOKENS, model.max_seq_len - prompt.shape[1]))
    return Reference(ids, logits, greedy_tokens(our_step(model), prompt, n_tokens))


def prompt_of(ids: Array) -> Array:
    return ids[:1, : min(PROMPT_TOKENS, (ids.shape[1] + 1) // 2)]


def greedy_tokens(step: Step, prompt: Array, n_tokens: int) -> Array:
    """Return the most likely continuation (n,) of a prompt (1, T), by the cache."""
    found: list[int] = []
    ids, cache = prompt, None
    for _ in range(n_tokens):
        logits, cache = step(ids, cache)
        found.append(int(logits[0, -1].argmax()))
        ids = np.array([found[-1:]])
    return np.array(found, np.int64)


def compare(step: Step, reference: Reference) -> Parity:
    """Return how far a converted model agrees with the reference."""
    logits, _ = step(reference.ids, None)
    difference = float(np.abs(logits - reference.logits).max())
    greedy = greedy_tokens(step, prompt_of(reference.ids), len(reference.greedy))
    different = np.flatnonzero(greedy != reference.greedy)
    agreed = int(different[0]) if len(different) else len(greedy)
    return Parity(difference, agreed, len(greedy))


def require_parity(parity: Parity, reference: Reference) -> None:
    """Raise UserError if rounding does not explain the difference of the logits."""
    if not parity.difference <= reference.tolerance:  # NaN is a difference too
        raise UserError(
            f"the converted model is not the same: {parity}, where rounding explains "
            f"{reference.tolerance:.1e}; nothing was written. Please report this as a bug"
        )


def ids_of_texts(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Return the ids of each of TEXTS that the tokenizer can encode."""
    found = {}
    for text in TEXTS:
        try:
            found[text] = tokenizer.encode(text)
        except UserError:  # the text has bytes without an id
            continue
    return found


def require_same_ids(tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> int:
    """Raise UserError if a converted tokenizer has other ids; return the number of texts."""
    ids = ids_of_texts(tokenizer)
    refuse_different([text for text in ids if encode(text) != ids[text]])
    return len(ids)


def refuse_different(texts: list[str]) -> None:
    """Raise UserError that names the first text of which a converted tokenizer has other ids."""
    if texts:
        raise UserError(
            f"the converted tokenizer has other ids for {texts[0]!r}; nothing was written. "
            "Please report this as a bug"
        )
