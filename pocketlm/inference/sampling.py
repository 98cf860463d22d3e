"""Sampling: from logits to the next token, as pure functions of a batch that shares its parameters.

The order is vLLM's and that of Hugging Face's logits processors: bias, repetition penalty,
frequency and presence penalty, banned n-grams; then temperature, top-k, top-p, min-p.

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
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pocketlm.config.sampling import SamplingParams

TokenScore = tuple[float, list[tuple[int, float]]]  # log-probability; most likely ids with theirs
Sampler = Callable[[Tensor, SamplingParams, Tensor], Tensor]  # as `sample_in_torch`

NO_TOKEN = -1  # for a row in which biases and banned n-grams exclude every token
# Temperatures beyond these, at which a text is greedy or random, would be 0 or infinite in float32
SMALLEST_DIVISOR, LARGEST_DIVISOR = torch.finfo(torch.float32).tiny, 1e30


def sample(
    logits: Tensor,
    params: SamplingParams,
    contexts: Sequence[Sequence[int]],
    draws: Tensor,
    sampler: Sampler | None = None,
    n_generated: Sequence[int] | None = None,
) -> Tensor:
    """Return the next token (B,) for logits (B, V) after `contexts`, B lists of ids.

    Each row has a draw in [0, 1), which falls into one token's share of the probability: the same
    draw gives the same token, whatever the other rows are. Temperature 0 takes the most likely
    token, the first of equals. A row without a token that may follow has NO_TOKEN. `sampler`
    replaces `sample_in_torch`; n_generated: see `apply_biases_and_penalties`.
    """
    logits = apply_biases_and_penalties(logits.float(), params, contexts, n_generated)
    excludes = params.no_repeat_ngram or params.logit_bias
    impossible = logits.amax(-1) == -math.inf if excludes else torch.tensor(False)
    if not impossible.any():
        return choose(logits, params, draws, sampler)
    tokens = choose(logits.masked_fill(impossible[:, None], 0), params, draws, sampler)
    return tokens.masked_fill(impossible, NO_TOKEN)


def choose(
    logits: Tensor, params: SamplingParams, draws: Tensor, sampler: Sampler | None
) -> Tensor:
    """Return the token (B,) at the draws (B,), or the most likely one at temperature 0."""
    if params.temperature == 0:
        return logits.argmax(-1)
    return (sampler or sample_in_torch)(logits, params, draws.double())


def filter_logits(
    logits: Tensor,
    params: SamplingParams,
    contexts: Sequence[Sequence[int]],
    n_generated: Sequence[int] | None = None,
) -> Tensor:
    """Return logits (B, V) after all filters; excluded tokens have -inf."""
    logits = apply_biases_and_penalties(logits, params, contexts, n_generated)
    excluded = (truncate_logits(logits, params) == -math.inf) | (logits == -math.inf)
    largest = torch.finfo(logits.dtype).max
    return (logits / divisor(params)).clamp(-largest, largest).masked_fill(excluded, -math.inf)


# ---- filters ----


def apply_biases_and_penalties(
    logits: Tensor,
    params: SamplingParams,
    contexts: Sequence[Sequence[int]],
    n_generated: Sequence[int] | None = None,
) -> Tensor:
    """Apply what affects greedy decoding too: biases, penalties and banned n-grams.

    n_generated: how many of the last ids of each context were generated (default: all), which
    are those that frequency and presence penalties count, as OpenAI and vLLM do.
    """
    counted = params.frequency_penalty != 0 or params.presence_penalty != 0
    repeated = params.repetition_penalty != 1
    if not (params.logit_bias or repeated or counted or params.no_repeat_ngram):
        return logits
    logits = logits.clone()
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        values = torch.tensor(biases, dtype=logits.dtype).expand(len(logits), -1)
        logits.index_add_(1, torch.tensor(tokens), values)
    n_generated = n_generated or [len(context) for context in contexts]
    for row, context, n in zip(logits, contexts, n_generated, strict=True):
        if repeated:
            apply_repetition_penalty(row, context, params.repetition_penalty)
        if counted:
            apply_count_penalties(row, context[len(context) - n :], params)
        if params.no_repeat_ngram:
            row[banned_ngram_tokens(context, params.no_repeat_ngram)] = -math.inf
    return logits


def truncate_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Apply top-k, temperature, top-p and min-p in this order; return logits less the largest.

    The difference is taken before the division, so that no temperature makes the largest infinite.
    min-p is from Nguyen et al. 2024.
    """
    if 0 < params.top_k < logits.size(-1):
        threshold = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    top = logits.amax(-1, keepdim=True)
    logits = torch.where(logits == top, 0, logits - top)  # of equal infinities too
    logits = logits / divisor(params)
    if params.top_p < 1:
        threshold = top_p_threshold(logits, params.top_p)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if params.min_p > 0:
        logits = logits.masked_fill(logits < math.log(params.min_p), -math.inf)
    return logits


def divisor(params: SamplingParams) -> float:
    """Return the temperature as a divisor of logits in float32; 1 if it is 0."""
    if params.temperature == 0:
        return 1.0
    return min(max(params.temperature, SMALLEST_DIVISOR), LARGEST_DIVISOR)


def apply_repetition_penalty(row: Tensor, context: Sequence[int], penalty: float) -> None:
    """Penalise tokens of the context, in place (Keskar et al. 2019).

    Positive logits of row (V,) are divided by the penalty, negative ones multiplied by it.
    """
    seen = torch.tensor(sorted(set(context)), dtype=torch.long, device=row.device)
    row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)


def apply_count_penalties(row: Tensor, generated: Sequence[int], params: SamplingParams) -> None:
    """Subtract the frequency penalty for each occurrence and the presence penalty, in place.

    The formula is that of OpenAI's API reference.
    """
    counts = Counter(generated)
    tokens = torch.tensor(list(counts), dtype=torch.long, device=row.device)
    times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
    row[tokens] -= params.frequency_penalty * times + params.presence_penalty


def banned_ngram_tokens(context: Sequence[int], n: int) -> list[int]:
    """Return the tokens that would complete an n-gram which the context contains already.

    >>> banned_ngram_tokens([1, 2, 3, 1, 2], 3)
    [3]
    >>> banned_ngram_tokens([1, 2, 3, 1, 2], 1)
    [1, 2, 3]
    >>> banned_ngram_tokens([1], 3)
    []
    """
    ids = np.asarray(context, dtype=np.int64)
    ends = np.arange(n - 1, len(ids))  # of n-grams; those whose other tokens are the last ones stay
    for back in range(1, n):
        if not len(ends):
            break
        ends = ends[ids[ends - back] == ids[-back]]
    tokens: list[int] = np.unique(ids[ends]).tolist()
    return tokens


def top_p_threshold(logits: Tensor, top_p: float) -> Tensor:
    """Return (B, 1) the smallest logit in the nucleus of each row (Holtzman et al. 2020).

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p, at least
    one: top_p may be 0 in float32.
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
        # A token is in the nucleus if those before it do not reach top_p
        size = int((p.cumsum(-1) - p < top_p).sum())
        thresholds.append(descending[max(0, size - 1)])
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


def log_probabilities(logits: Tensor, tokens: Tensor, top: int) -> list[TokenScore]:
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
