"""From logits to the next token: pure functions, of a batch whose rows share their parameters.

The order is that of Hugging Face's processors: bias, repetition penalty, no repeated n-gram, temperature, top-k, top-p, min-p.

>>> logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
>>> filter_logits(logits, SamplingParams(temperature=1.0, top_k=2, top_p=1.0), [[]]).tolist()
[[4.0, 3.0, -inf, -inf]]
>>> filter_logits(logits, SamplingParams(temperature=0.5, top_p=1.0, repetition_penalty=2.0), [[0, 2]]).tolist()
[[4.0, 6.0, 2.0, 2.0]]
>>> even = torch.zeros(1, 4)  # four tokens of probability 1/4: the third has the draws from 0.5 to 0.75
>>> sample(even, SamplingParams(temperature=1.0, top_p=1.0), [[]], torch.tensor([0.6])).tolist()
[2]
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pocketlm.config.sampling import SamplingParams

Sampler = Callable[[Tensor, SamplingParams, Tensor], Tensor]


def sample(
    logits: Tensor,
    params: SamplingParams,
    contexts: Sequence[Sequence[int]],
    draws: Tensor,
    choose: Sampler | None = None,
) -> Tensor:
    """The next token (B,) out of logits (B, V) behind `contexts`, B lists of ids.

    Each row has a draw in [0, 1), which falls into one token's share of the row: the same draw, the same token, whatever
    the other rows are. Temperature 0 takes the likeliest, the first of equals. `choose` is for another `choose_in_torch`.
    """
    logits = apply_biases_and_penalties(logits.float(), params, contexts)
    if params.temperature == 0:
        return logits.argmax(-1)
    return (choose or sample_in_torch)(logits, params, draws.double())


def filter_logits(
    logits: Tensor, params: SamplingParams, contexts: Sequence[Sequence[int]]
) -> Tensor:
    """Logits (B, V) with what the parameters rule out at -inf."""
    return truncate_logits(apply_biases_and_penalties(logits, params, contexts), params)


def apply_biases_and_penalties(
    logits: Tensor, params: SamplingParams, contexts: Sequence[Sequence[int]]
) -> Tensor:
    """What holds for greedy text too: bias and penalties."""
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
    """Temperature, 0 apart, and then the likeliest tokens only: top-k, top-p, min-p (Nguyen et al. 2024)."""
    if params.temperature > 0:
        logits = logits / params.temperature
    if 0 < params.top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[:, -1:], -math.inf)
    if params.top_p < 1:
        logits = logits.masked_fill(logits < top_p_threshold(logits, params.top_p), -math.inf)
    if params.min_p > 0:
        logits = logits.masked_fill(
            logits < logits.amax(-1, keepdim=True) + math.log(params.min_p), -math.inf
        )
    return logits


def apply_repetition_penalty(row: Tensor, context: Sequence[int], penalty: float) -> None:
    """Divide the logits (V,) of what has occurred by the penalty where above 0, else multiply (Keskar et al. 2019)."""
    seen = torch.tensor(sorted(set(context)), dtype=torch.long, device=row.device)
    row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)


def banned_ngram_tokens(context: Sequence[int], n: int) -> list[int]:
    """The tokens that would end an n-gram which the context has already.

    >>> banned_ngram_tokens([1, 2, 3, 1, 2], 3), banned_ngram_tokens([1, 2, 3, 1, 2], 1), banned_ngram_tokens([1], 3)
    ([3], [1, 2, 3], [])
    """
    begin = tuple(context[len(context) - n + 1 :])
    grams = zip(*(context[i:] for i in range(n)), strict=False)
    return sorted({gram[-1] for gram in grams if gram[:-1] == begin})


def top_p_threshold(logits: Tensor, top_p: float) -> Tensor:
    """(B, 1) the least logit of the likeliest tokens that have probability top_p together (Holtzman et al. 2020)."""
    norm = logits.logsumexp(-1, keepdim=True)
    # All that are below the floor have half of 1 - top_p together at most: the nucleus is above, and few tokens have to be sorted
    floor = norm + math.log((1 - top_p) / (2 * logits.size(-1)))
    found = []
    for row, least, total in zip(logits.numpy(), floor.numpy(), norm, strict=True):
        ordered = torch.from_numpy(
            -np.sort(-row[row >= least])
        )  # a third of the time of torch's sort
        p = (ordered - total).exp()
        inside = (
            p.cumsum(-1) - p < top_p
        )  # what is before a token is not enough yet; the first is always inside
        found.append(ordered[inside.sum() - 1])
    return torch.stack(found)[:, None]


def sample_in_torch(logits: Tensor, params: SamplingParams, draws: Tensor) -> Tensor:
    """Of each row of logits (B, V), the token that is drawn among the likeliest."""
    return torch.stack(
        [pick(row, draw) for row, draw in zip(truncate_logits(logits, params), draws, strict=True)]
    )


def pick(row: Tensor, draw: Tensor) -> Tensor:
    """The token () of logits (V,) in whose share of the row the draw falls. Only what is not ruled out is looked at."""
    left = torch.from_numpy(np.flatnonzero(row.numpy() > -math.inf))
    mass = row[left].softmax(-1).cumsum(-1, dtype=torch.float64)
    return left[torch.searchsorted(mass, draw * mass[-1], right=True)]


def log_probabilities(
    logits: Tensor, tokens: Tensor, top: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each row of the model's own logits (B, V): nats of its token (B,), and the `top` likeliest with theirs."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    best = logprobs.topk(top)
    return [
        (p, list(zip(i, v, strict=True)))
        for p, i, v in zip(chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    ]
