"""Log-probabilities of continuations after their contexts, from few forward passes.

Context and continuation are encoded as one text, after the token that begins a document, and cut
into a `Query`. `query_likelihoods` computes the `Likelihood` of many queries. Queries with the same
context share its forward pass and its keys and values; contexts of equal length form a batch, so
that no context is padded. Log-probabilities are natural logarithms, computed in float32.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model import KVCache, Transformer
from pocketlm.model.quantization import without_bfloat16_products
from pocketlm.tokenizer.base import Tokenizer

MAX_BATCH_TOKENS = 4096  # in one forward pass
MAX_LOGIT_ROWS = 256  # positions whose logits exist at the same time


class Query(NamedTuple):
    """Token ids of a context and of a continuation whose probability is requested."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


RowQuery = tuple[int, Query]  # a query, and the row of its context in the batch


@dataclass
class Likelihood:
    """The probabilities that a model gives to a query's continuation."""

    logprobs: list[float] = field(default_factory=list)  # of each token of the continuation
    greedy: bool = True  # greedy decoding writes the continuation
    rank: int = 0  # of the first token in the whole vocabulary; 1 is the most likely
    top: list[tuple[int, float]] = field(default_factory=list)  # most likely first tokens, with p

    @property
    def logprob(self) -> float:
        """Log-probability of the whole continuation."""
        return math.fsum(self.logprobs)


# ---- text to queries ----


class EncodedPair(NamedTuple):
    """A context with its continuation, encoded as one text."""

    ids: tuple[int, ...]
    start: int  # index of the first token of the continuation
    merged: bool  # one token spans the end of the context and the start of the continuation


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> EncodedPair:
    """Encode document prefix, context and continuation as one text.

    If one token spans the context's end and the continuation, the continuation starts with it.
    """
    both, alone = tokenizer.encode(context + continuation), tokenizer.encode(context)
    shared = min(len(alone), len(both))
    for i, (a, b) in enumerate(zip(alone, both, strict=False)):
        if a != b:
            shared = i
            break
    prefix = tokenizer.document_prefix
    return EncodedPair((*prefix, *both), len(prefix) + shared, shared < len(alone))


def split_at_common_start(pairs: list[EncodedPair]) -> list[Query]:
    """Return queries whose contexts all end where the earliest continuation starts.

    A token that spans the context's end and a continuation is then scored in every candidate.
    Without any context the longest common prefix is the context: it does not affect the comparison.
    """
    ids = [pair.ids for pair in pairs]
    start = min(pair.start for pair in pairs) or common_prefix_length(ids)
    return [Query(tokens[:start], tokens[start:]) for tokens in ids]


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return the number of leading tokens that differing sequences share; 0 if none differ.

    >>> common_prefix_length([[1, 2, 3], [1, 2, 4, 5]])
    2
    """
    for i, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return i
    return 0


def text_windows(tokenizer: Tokenizer, text: str, max_seq_len: int) -> Iterator[Query]:
    """Yield the text in windows of the model's context, so that each token is scored once.

    The last window is filled up with tokens before it, which are not scored again.
    """
    ids = (*tokenizer.document_prefix, *tokenizer.encode(text))
    for start in range(1, len(ids), max_seq_len):
        end = min(start + max_seq_len, len(ids))
        yield Query(ids[max(0, end - 1 - max_seq_len) : start], ids[start:end])


# ---- queries to likelihoods ----


@torch.inference_mode()
def query_likelihoods(
    model: Transformer, queries: Iterable[Query], top_k: int = 0
) -> dict[Query, Likelihood]:
    """Return the likelihood of each query; equal queries are computed once.

    `top_k` is the number of most likely first tokens to return with each likelihood.
    """
    model = without_bfloat16_products(model)
    likelihoods = {query: Likelihood() for query in queries}
    by_context: dict[tuple[int, ...], list[Query]] = defaultdict(list)
    for query in likelihoods:
        by_context[query.context].append(query)
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for context in by_context:
        by_length[len(context)].append(context)
    for length, contexts in sorted(by_length.items()):
        batch_size = max(1, MAX_BATCH_TOKENS // length)
        for first in range(0, len(contexts), batch_size):
            batch = contexts[first : first + batch_size]
            row_queries: list[RowQuery] = []
            for row, context in enumerate(batch):
                row_queries += [(row, query) for query in by_context[context]]
            cache = new_cache(model, len(batch), length)
            last_hidden = model.hidden(pad_rows(batch, model.device), cache=cache)[:, -1]  # (B, C)
            score_first_tokens(model, last_hidden, row_queries, likelihoods, top_k)
            longer = [(row, query) for row, query in row_queries if len(query.continuation) > 1]
            score_later_tokens(model, cache, longer, likelihoods)
    return likelihoods


def pad_rows(rows: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """Return token ids (B, T), right-padded: causal attention hides the padding."""
    longest = max(len(row) for row in rows)
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, device=device)


def new_cache(model: Transformer, batch_size: int, length: int) -> KVCache:
    """Return an empty cache with the model's device and dtype."""
    return KVCache(model.config, batch_size, length, dtype=model.dtype, device=model.device)


def extend_cache(model: Transformer, cache: KVCache, rows: list[int], max_len: int) -> KVCache:
    """Return a copy of these rows of `cache` that has room for `max_len` tokens."""
    extended = new_cache(model, len(rows), max_len)
    index = torch.tensor(rows, device=cache.keys.device)
    extended.keys[:, :, :, : cache.length] = cache.keys[:, index]
    extended.values[:, :, :, : cache.length] = cache.values[:, index]
    extended.tokens[:, : cache.length] = cache.tokens[index, : cache.length]
    extended.length = cache.length
    return extended


def score_first_tokens(
    model: Transformer,
    last_hidden: Tensor,
    row_queries: list[RowQuery],
    likelihoods: dict[Query, Likelihood],
    top_k: int,
) -> None:
    """Score the first token of each continuation from its context's last hidden state (B, C).

    All continuations of a context share its distribution over the vocabulary.
    """
    for first in range(0, len(last_hidden), MAX_LOGIT_ROWS):
        logits = model.logits(last_hidden[first : first + MAX_LOGIT_ROWS]).float()  # (b, V)
        norm, best = logits.logsumexp(-1), logits.argmax(-1)
        top = logits.topk(min(top_k, logits.size(-1)))
        end = first + len(logits)
        local = [(row - first, query) for row, query in row_queries if first <= row < end]
        rows = torch.tensor([row for row, _ in local], device=logits.device)
        tokens = torch.tensor([query.continuation[0] for _, query in local], device=logits.device)
        token_logits = logits[rows, tokens]
        logprobs = (token_logits - norm[rows]).tolist()
        greedy = (best[rows] == tokens).tolist()
        ranks = ranks_of(logits, rows, token_logits)
        for (row, query), logprob, is_best, rank in zip(
            local, logprobs, greedy, ranks, strict=True
        ):
            likelihood = likelihoods[query]
            likelihood.logprobs.append(logprob)
            likelihood.greedy, likelihood.rank = is_best, rank
            probabilities = (top.values[row] - norm[row]).exp().tolist()
            top_tokens = top.indices[row].tolist()
            likelihood.top = list(zip(top_tokens, probabilities, strict=True))


def ranks_of(logits: Tensor, rows: Tensor, values: Tensor) -> list[int]:
    """Return the rank of each of `values` (N,) in its row of `logits` (b, V); 1 is the largest.

    A chunk of MAX_LOGIT_ROWS values is compared at a time, since `logits[rows]` is a copy.
    """
    ranks: list[int] = []
    for first in range(0, len(rows), MAX_LOGIT_ROWS):
        chunk = slice(first, first + MAX_LOGIT_ROWS)
        ranks += ((logits[rows[chunk]] > values[chunk, None]).sum(-1) + 1).tolist()
    return ranks


def score_later_tokens(
    model: Transformer,
    cache: KVCache,
    row_queries: list[RowQuery],
    likelihoods: dict[Query, Likelihood],
) -> None:
    """Score tokens 2 to n of continuations whose contexts are in `cache`.

    The continuations are fed without their last token, the longest ones first, in batches.
    """
    remaining = sorted(row_queries, key=lambda row_query: len(row_query[1].continuation))
    while remaining:
        longest = len(remaining[-1][1].continuation) - 1
        batch_size = max(1, MAX_BATCH_TOKENS // (cache.length + longest))
        remaining, batch = remaining[:-batch_size], remaining[-batch_size:]
        extended = extend_cache(model, cache, [row for row, _ in batch], cache.length + longest)
        queries = [query for _, query in batch]
        inputs = pad_rows([query.continuation[:-1] for query in queries], model.device)
        read_later_tokens(model, model.hidden(inputs, cache=extended), queries, likelihoods)


def read_later_tokens(
    model: Transformer,
    hidden: Tensor,
    queries: list[Query],
    likelihoods: dict[Query, Likelihood],
) -> None:
    """Read the log-probabilities of tokens 2 to n from the hidden states (B, T, C) before them."""
    positions: list[tuple[int, int]] = []  # (row, t): hidden[row, t] predicts token t + 2
    targets: list[int] = []
    for row, query in enumerate(queries):
        positions += [(row, t) for t in range(len(query.continuation) - 1)]
        targets += query.continuation[1:]
    flat = hidden[tuple(torch.tensor(positions, device=hidden.device).T)]  # (N, C)
    target_ids = torch.tensor(targets, device=hidden.device)
    logprobs: list[float] = []
    greedy: list[bool] = []
    for first in range(0, len(flat), MAX_LOGIT_ROWS):
        chunk = slice(first, first + MAX_LOGIT_ROWS)
        logits, target = model.logits(flat[chunk]).float(), target_ids[chunk]
        logprobs += (logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
        greedy += (logits.argmax(-1) == target).tolist()
    for (row, _), logprob, is_best in zip(positions, logprobs, greedy, strict=True):
        likelihood = likelihoods[queries[row]]
        likelihood.logprobs.append(logprob)
        likelihood.greedy &= is_best
