"""Sampling: from logits to the next token, as pure functions of a batch that shares its parameters.

The order is that of Hugging Face's logits processors: bias, repetition penalty, banned n-grams,
temperature, top-k, top-p, min-p.

>>> logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
>>> top_2 = SamplingParams(temperature=1.0, top_k=2, top_p=1.0)
>>> filter_logits(logits, top_2, [[]]).tolist()
[[4.0, 3.0, -inf, -inf]]
>>> penalty = SamplingParams(temperature=0.5, top_p=1.0, repetition_penalty=2.0)
>>> filter_logits(logits, penalty, [[0, 2]]).tolist()
[[4.0, 6.0, 2.0, 2.0]]
>>> even = torch.zeros(1, 4)  # of probability 1/4 each: the third has the draws in [0.5, 0.75)
>>> sample(even, SamplingParams(temperature=1.0, top_p=1.0), [[]], torch.tensor([0.6])).tolist()
[2]
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pocketlm.config.sampling import SamplingParams

Sampler = Callable[[Tensor, SamplingParams, Tensor], Tensor]  # as `sample_in_torch`


def sample(
    logits: Tensor,
    params: SamplingParams,
    contexts: Sequence[Sequence[int]],
    draws: Tensor,
    sampler: Sampler | None = None,
) -> Tensor:
    """Return the next token (B,) for logits (B, V) after `contexts`, B lists of ids.

    Each row has a draw in [0, 1), which falls into one token's share of the probability: the same
    draw gives the same token, whatever the other rows are. Temperature 0 takes the most likely
    token, the first of equals. `sampler` replaces `sample_in_torch`.
    """
    logits = apply_biases_and_penalties(logits.float(), params, contexts)
    if params.temperature == 0:
        return logits.argmax(-1)
    return (sampler or sample_in_torch)(logits, params, draws.double())


def filter_logits(
    logits: Tensor, params: SamplingParams, contexts: Sequence[Sequence[int]]
) -> Tensor:
    """Return logits (B, V) after all filters; excluded tokens have -inf."""
    return truncate_logits(apply_biases_and_penalties(logits, params, contexts), params)


# ---- filters ----


def apply_biases_and_penalties(
    logits: Tensor, params: SamplingParams, contexts: Sequence[Sequence[int]]
) -> Tensor:
    """Apply what affects greedy decoding too: biases, repetition penalty and banned n-grams."""
    if not params.logit_bias and params.repetition_penalty == 1 and not params.no_repeat_ngram:
        return logits
    logits = logits.clone()
    for token, bias in params.logit_bias:
        logits[:, token] += bias
    for row, context in zip(logits, contexts, strict=True):
        if params.repetition_penalty != 1:
            apply_repetition_penalty(row, context, params.repetition_penalty)
        if params.no_repeat_ngram:
            row[banned_ngram_tokens(context, params.no_repeat_ngram)] = -math.inf
    return logits


def truncate_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Divide by the temperature unless it is 0, then apply top-k, top-p and min-p in this order.

    min-p is from Nguyen et al. 2024.
    """
    if params.temperature > 0:
        logits = logits / params.temperature
    if 0 < params.top_k < logits.size(-1):
        threshold = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if params.top_p < 1:
        threshold = top_p_threshold(logits, params.top_p)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if params.min_p > 0:
        threshold = logits.amax(-1, keepdim=True) + math.log(params.min_p)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    return logits


def apply_repetition_penalty(row: Tensor, context: Sequence[int], penalty: float) -> None:
    """Penalise tokens of the context, in place (Keskar et al. 2019).

    Positive logits of row (V,) are divided by the penalty, negative ones multiplied by it.
    """
    seen = torch.tensor(sorted(set(context)), dtype=torch.long, device=row.device)
    row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)


def banned_ngram_tokens(context: Sequence[int], n: int) -> list[int]:
    """Return the tokens that would complete an n-gram which the context contains already.

    >>> banned_ngram_tokens([1, 2, 3, 1, 2], 3)
    [3]
    >>> banned_ngram_tokens([1, 2, 3, 1, 2], 1)
    [1, 2, 3]
    >>> banned_ngram_tokens([1], 3)
    []
    """
    prefix = tuple(context[len(context) - n + 1 :])
    ngrams = zip(*(context[i:] for i in range(n)), strict=False)
    return sorted({ngram[-1] for ngram in ngrams if ngram[:-1] == prefix})


def top_p_threshold(logits: Tensor, top_p: float) -> Tensor:
    """Return (B, 1) the smallest logit in the nucleus of each row (Holtzman et al. 2020).

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p.
    """
    log_norm = logits.logsumexp(-1, keepdim=True)
    # All tokens below the floor together have at most half of 1 - top_p: the nucleus is above the
    # floor, and only the few tokens there need sorting
    floors = log_norm + math.log((1 - top_p) / (2 * logits.size(-1)))
    thresholds = []
    for row, floor, norm in zip(logits.numpy(), floors.numpy(), log_norm, strict=True):
        # NumPy's sort takes a third of the time of torch's
        descending = torch.from_numpy(-np.sort(-row[row >= floor]))
        p = (descending - norm).exp()
        # A token is in the nucleus if those before it do not reach top_p; the first always is
        in_nucleus = p.cumsum(-1) - p < top_p
        thresholds.append(descending[in_nucleus.sum() - 1])
    return torch.stack(thresholds)[:, None]


# ---- drawing a token ----


def sample_in_torch(logits: Tensor, params: SamplingParams, draws: Tensor) -> Tensor:
    """Return the token (B,) at the draws (B,) among the tokens that truncation leaves."""
    rows = zip(truncate_logits(logits, params), draws, strict=True)
    return torch.stack([sample_index(row, draw) for row, draw in rows])


def sample_index(row: Tensor, draw: Tensor) -> Tensor:
    """Return the token () of logits (V,) whose share of the probability contains the draw."""
    candidates = torch.from_numpy(np.flatnonzero(row.numpy() > -math.inf))
    cumulative = row[candidates].softmax(-1).cumsum(-1, dtype=torch.float64)
    return candidates[torch.searchsorted(cumulative, draw * cumulative[-1], right=True)]


def log_probabilities(
    logits: Tensor, tokens: Tensor, top: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Return log-probabilities under the model's unfiltered logits (B, V).

    For each row: the log-probability of its token in `tokens` (B,), and the `top` most likely
    tokens with theirs.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    most_likely = logprobs.topk(top)
    result = []
    for logprob, ids, values in zip(
        chosen, most_likely.indices.tolist(), most_likely.values.tolist(), strict=True
    ):
        result.append((logprob, list(zip(ids, values, strict=True))))
    return result
