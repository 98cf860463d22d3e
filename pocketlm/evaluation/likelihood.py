"""Log-probabilities of whole continuations, from as few forward passes as will do."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model import KVCache, Transformer

TOKENS = 4096  # in one forward pass


POSITIONS = 256  # whose logits exist at a time


class Query(NamedTuple):
    """Ids to continue, and the ids whose probability is asked."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass
class Likelihood:
    """What the model says to a request."""

    logprobs: list[float] = field(default_factory=list)  # nats, of each token of the continuation
    greedy: bool = True  # each of them was the likeliest one
    rank: int = 0  # of the first one among all tokens, 1 the likeliest
    top: list[tuple[int, float]] = field(
        default_factory=list
    )  # the likeliest first tokens and their probabilities

    @property
    def logprob(self) -> float:
        return math.fsum(self.logprobs)


# ---- requests -> answers ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def query_likelihoods(
    model: Transformer, requests: list[Query], top_k: int = 0
) -> dict[Query, Likelihood]:
    """The answers to all requests; equal ones are asked once."""
    answers = {request: Likelihood() for request in requests}
    by_context: dict[tuple[int, ...], list[Query]] = defaultdict(list)
    for request in answers:
        by_context[request.context].append(request)
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for context in by_context:
        by_length[len(context)].append(context)
    for length, contexts in sorted(by_length.items()):
        for first in range(0, len(contexts), size := max(1, TOKENS // length)):
            chosen = contexts[first : first + size]
            cache = new_cache(model, len(chosen), length)
            last = model.hidden(as_tensor(model, chosen), cache=cache)[:, -1]  # (B, C)
            asked = [
                (row, request)
                for row, context in enumerate(chosen)
                for request in by_context[context]
            ]
            answer_first_tokens(model, last, asked, answers, top_k)
            answer_later_tokens(
                model,
                cache,
                [(row, request) for row, request in asked if len(request.continuation) > 1],
                answers,
            )
    return answers


def as_tensor(model: Transformer, rows: list[tuple[int, ...]]) -> Tensor:
    """Rows of ids (B, T), shorter ones filled up behind, where causal attention ignores it."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)


def new_cache(model: Transformer, batch_size: int, length: int) -> KVCache:
    return KVCache(model.config, batch_size, length, dtype=model.dtype, device=model.device)


def answer_first_tokens(
    model: Transformer,
    last: Tensor,
    asked: list[tuple[int, Query]],
    answers: dict[Query, Likelihood],
    top_k: int,
) -> None:
    """From the context's last hidden state (B, C): a single distribution for all continuations of a context."""
    for first in range(0, len(last), POSITIONS):
        logits = model.logits(last[first : first + POSITIONS]).float()  # (b, V)
        norm, best = logits.logsumexp(-1), logits.argmax(-1)
        top = logits.topk(min(top_k, logits.size(-1)))
        here = [
            (row - first, request) for row, request in asked if first <= row < first + len(logits)
        ]
        rows = torch.tensor([row for row, _ in here], device=last.device)
        tokens = torch.tensor([request.continuation[0] for _, request in here], device=last.device)
        found = logits[rows, tokens]
        logprobs, greedy = (found - norm[rows]).tolist(), (best[rows] == tokens).tolist()
        ranks = [
            rank
            for r, value in zip(rows.split(POSITIONS), found.split(POSITIONS), strict=True)
            for rank in ranks_of(logits[r], value)
        ]
        for (row, request), logprob, is_best, rank in zip(
            here, logprobs, greedy, ranks, strict=True
        ):
            a = answers[request]
            a.logprobs.append(logprob)
            a.greedy, a.rank = is_best, rank
            a.top = list(
                zip(
                    top.indices[row].tolist(),
                    (top.values[row] - norm[row]).exp().tolist(),
                    strict=True,
                )
            )


def ranks_of(logits: Tensor, values: Tensor) -> list[int]:
    """1 for the largest, of each of values (N,) among its row of logits (N, V)."""
    return ((logits > values[:, None]).sum(-1) + 1).tolist()


def answer_later_tokens(
    model: Transformer,
    cache: KVCache,
    asked: list[tuple[int, Query]],
    answers: dict[Query, Likelihood],
) -> None:
    """Behind the contexts in `cache`: each continuation but its last token goes in, and its second to last are read off."""
    asked = sorted(asked, key=lambda pair: len(pair[1].continuation))
    while asked:
        longest = len(asked[-1][1].continuation) - 1
        size = max(1, TOKENS // (cache.length + longest))
        asked, chosen = asked[:-size], asked[-size:]
        behind = new_cache(model, len(chosen), cache.length + longest)
        rows = torch.tensor([row for row, _ in chosen], device=cache.keys.device)
        behind.keys[:, :, :, : cache.length] = cache.keys[:, rows]
        behind.values[:, :, :, : cache.length] = cache.values[:, rows]
        behind.length = cache.length
        hidden = model.hidden(
            as_tensor(model, [request.continuation[:-1] for _, request in chosen]), cache=behind
        )
        places = [
            (row, t)
            for row, (_, request) in enumerate(chosen)
            for t in range(len(request.continuation) - 1)
        ]
        targets = torch.tensor(
            [t for _, request in chosen for t in request.continuation[1:]], device=hidden.device
        )
        flat = hidden[tuple(torch.tensor(places, device=hidden.device).T)]  # (N, C)
        logprobs, greedy = [], []
        for part, target in zip(flat.split(POSITIONS), targets.split(POSITIONS), strict=True):
            logits = model.logits(part).float()
            logprobs += (logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
            greedy += (logits.argmax(-1) == target).tolist()
        for (row, _), logprob, is_best in zip(places, logprobs, greedy, strict=True):
            a = answers[chosen[row][1]]
            a.logprobs.append(logprob)
            a.greedy &= is_best
