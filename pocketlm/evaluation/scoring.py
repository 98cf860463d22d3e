"""Scores of probe cases: which candidate a model finds most likely, and how sure it is.

    encoded = [encode_case(tokenizer, case, model.max_seq_len) for case in suite.cases]
    scores = score_cases(model, tokenizer, encoded)

A candidate is a context with a continuation; its log-probability is that of all tokens of the
continuation. PMI, pointwise mutual information, is the log-probability minus that of the same
continuation without its context (Holtzman et al. 2021, arXiv 2104.08315).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model import Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.corpus.encodings import decode_text
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import Case
from pocketlm.evaluation.likelihood import (
    Likelihood,
    Query,
    encode_pair,
    query_likelihoods,
    split_at_common_start,
    text_windows,
)
from pocketlm.inference.generate import generate_texts
from pocketlm.tokenizer.base import Tokenizer

TIE = 1e-4  # nats: float32 rounding error of two equal sums of about 20 log-probabilities


# ---- cases -> queries ----


@dataclass(frozen=True)
class EncodedCase:
    """A case as queries, one for each candidate (or window of a text)."""

    case: Case
    queries: tuple[Query, ...]
    pmi_queries: tuple[Query, ...] = ()  # the continuations without their context
    merged: bool = False  # in one of the candidates


def encode_case(tokenizer: Tokenizer, case: Case, max_seq_len: int) -> EncodedCase:
    """Return the queries of a case.

    Raises UserError if the case does not fit the model's context, has no token to score, or has no
    token before the first one to score.
    """
    pairs = [encode_pair(tokenizer, *candidate) for candidate in case.candidates]
    pmi_queries: list[Query] = []
    if case.type == "text":
        queries = list(text_windows(tokenizer, case_text(case), max_seq_len))
    elif case.type == "generate":
        queries = [Query((*tokenizer.document_prefix, *tokenizer.encode(case.prompt)), ())]
    elif case.type == "schema":
        queries = [Query(ids[:start], ids[start:]) for ids, start, _ in pairs]
    else:
        queries = split_at_common_start(pairs)
        pmi_queries = encode_without_context(tokenizer, case, queries)
    check_queries(tokenizer, case, [*queries, *pmi_queries], max_seq_len)
    merged = any(pair.merged for pair in pairs)
    return EncodedCase(case, tuple(queries), tuple(pmi_queries), merged)


def check_queries(tokenizer: Tokenizer, case: Case, queries: list[Query], max_seq_len: int) -> None:
    """Raise UserError if a query cannot be scored: no context, too long, or no continuation."""
    for context, continuation in queries:
        if not context:
            raise UserError(
                f"the case {case.id!r} has no token before the text to score, and no token begins "
                f"a document in {tokenizer.name!r}; add a prompt"
            )
        n = len(context) + len(continuation)
        if n > max_seq_len + bool(continuation):  # the last token of a continuation is not an input
            raise UserError(
                f"the case {case.id!r} has {n} tokens and the model a context of {max_seq_len}; "
                "shorten it"
            )
    empty = any(not query.continuation for query in queries) and case.type != "generate"
    if empty or not queries:
        raise UserError(
            f"the case {case.id!r} has a text to score without any token in {tokenizer.name!r}; "
            "change it"
        )


def encode_without_context(tokenizer: Tokenizer, case: Case, queries: list[Query]) -> list[Query]:
    """Return the continuations after `pmi_prompt` or the start of a document, for PMI.

    At the start of a document they keep the tokens that they have in context: SentencePiece, for
    one, would put a space before them. Minimal pairs and cases without distractors have no such
    queries, nor has any case if there is nothing that could come before the continuation.
    """
    if case.type == "minimal_pair" or not case.distractors:
        return []
    if not case.pmi_prompt:
        prefix = tuple(tokenizer.document_prefix)
        return [Query(prefix, query.continuation) for query in queries] if prefix else []
    continuations = [continuation for _, continuation in case.candidates]
    return split_at_common_start(
        [encode_pair(tokenizer, case.pmi_prompt, continuation) for continuation in continuations]
    )


def case_text(case: Case) -> str:
    """Return the text of a case of type text. Raise UserError if its file cannot be read."""
    try:
        return case.text or decode_text(Path(case.file).read_bytes(), "it")
    except (OSError, UserError) as error:
        raise UserError(f"the case {case.id!r} reads {case.file}: {error}") from None


# ---- comparing candidates ----


@dataclass(frozen=True)
class Comparison:
    """The result of comparing right candidates with wrong ones."""

    correct: float  # 1 right, 0 wrong, a share of 1 for a tie
    correct_by: dict[str, float]  # the same under each scoring: sum, token, byte, pmi
    tie: bool
    rank: int  # of the best right candidate among all; 1 is the most likely
    p_correct: float  # softmax over the candidates' summed log-probabilities
    margin: float  # nats between the best right and the best wrong candidate
    brier: float  # squared distance between the candidates' probabilities and the truth, 0 to 2


def compare_candidates(
    logprobs: Mapping[str, list[float]], n_right: int, scoring: str
) -> Comparison:
    """Compare candidates, of which the first `n_right` are right.

    `logprobs` holds the value of each candidate under each scoring; `scoring` names the one that
    decides. The probabilities are always those of "sum".

    >>> values = {"sum": [math.log(0.3), math.log(0.1)], "token": [-0.9, -0.8]}
    >>> compare_candidates(values, 1, "token")  # doctest: +NORMALIZE_WHITESPACE, +ELLIPSIS
    Comparison(correct=0.0, correct_by={'sum': 1.0, 'token': 0.0}, tie=False, rank=2,
               p_correct=0.7499..., margin=-0.09..., brier=0.125...)
    """
    credits = {name: credit(values, n_right) for name, values in logprobs.items()}
    sums, values = logprobs["sum"], logprobs[scoring]
    total = log_sum_exp(sums)
    p = [math.exp(value - total) for value in sums]
    p_correct = math.fsum(p[:n_right])
    best_right = max(values[:n_right])
    correct, tie = credits[scoring]
    return Comparison(
        correct=correct,
        correct_by={name: value for name, (value, _) in credits.items()},
        tie=tie,
        rank=1 + sum(value > best_right + TIE for value in values[n_right:]),
        p_correct=p_correct,
        margin=best_right - max(values[n_right:]),
        brier=(1 - p_correct) ** 2 + math.fsum(wrong**2 for wrong in p[n_right:]),
    )


def credit(values: list[float], n_right: int) -> tuple[float, bool]:
    """Return the score of a comparison, and whether right and wrong candidates tie.

    The score is 1 if a right candidate (one of the first `n_right`) has the largest value, and 0 if
    a wrong one has. In a tie it is the share of right candidates among those that tie.

    >>> credit([-1.0, -2.0], 1), credit([-1.0, -1.0, -3.0], 1), credit([-4.0, -1.0], 1)
    ((1.0, False), (0.5, True), (0.0, False))
    """
    best = max(values)
    winners = [i for i, value in enumerate(values) if value >= best - TIE]  # none if best is NaN
    right = sum(i < n_right for i in winners)
    return right / max(1, len(winners)), 0 < right < len(winners)


def log_sum_exp(values: list[float]) -> float:
    """Return the logarithm of the sum of exponentials, without overflow.

    >>> round(log_sum_exp([math.log(0.25), math.log(0.5)]) - math.log(0.75), 12)
    0.0
    """
    top = max(values)
    if not math.isfinite(top):
        return top
    return top + math.log(math.fsum(math.exp(value - top) for value in values))


# ---- likelihoods -> scores ----


@dataclass(frozen=True)
class Score:
    """The score of a checkpoint on one case. A field is None if the type of case has no such value.

    `correct` is that of the comparison where there are candidates to compare; otherwise it is 1 if
    greedy decoding writes an accepted answer or matches the pattern, else 0.
    """

    case: Case
    correct: float | None
    merged: bool = False  # one token spans the end of a context and the start of a continuation
    logprob: float | None = None  # nats; of all accepted answers together
    tokens: int = 0  # of the first right continuation
    bytes: int = 0
    greedy: bool | None = None  # greedy decoding writes an accepted answer
    first_token_rank: int | None = None  # best rank of a right continuation's first token
    top: tuple[tuple[str, float], ...] = ()  # the most likely next tokens with their probabilities
    comparison: Comparison | None = None
    generated: str = ""
    bits_per_byte: float | None = None

    @property
    def correct_by(self) -> dict[str, float]:
        return self.comparison.correct_by if self.comparison else {}

    @property
    def tie(self) -> bool:
        return self.comparison is not None and self.comparison.tie

    @property
    def rank(self) -> int | None:
        return self.comparison.rank if self.comparison else None

    @property
    def p_correct(self) -> float | None:
        return self.comparison.p_correct if self.comparison else None

    @property
    def margin(self) -> float | None:
        return self.comparison.margin if self.comparison else None

    @property
    def brier(self) -> float | None:
        return self.comparison.brier if self.comparison else None

    @property
    def finite(self) -> bool:
        """False if a number is infinite or NaN, as with broken weights."""
        values = (self.logprob, self.p_correct, self.bits_per_byte)
        return all(math.isfinite(value) for value in values if value is not None)


def score_cases(
    model: Transformer, tokenizer: Tokenizer, encoded: list[EncodedCase], top_k: int = 5
) -> list[Score]:
    """Return the score of each case. `top_k` is the number of next tokens to return with each."""
    likelihoods = query_likelihoods(model, scored_queries(encoded), top_k)
    scores = []
    for each in encoded:
        if each.case.type == "generate":
            scores.append(score_generation(model, tokenizer, each))
        elif each.case.type == "text":
            scores.append(score_text(each, likelihoods))
        else:
            scores.append(score_candidates(tokenizer, each, likelihoods))
    return scores


def scored_queries(encoded: list[EncodedCase]) -> list[Query]:
    """Return the queries that need a likelihood: all but those of generation."""
    queries: list[Query] = []
    for each in encoded:
        if each.case.type != "generate":
            queries += [*each.queries, *each.pmi_queries]
    return queries


def score_candidates(
    tokenizer: Tokenizer, encoded: EncodedCase, likelihoods: Mapping[Query, Likelihood]
) -> Score:
    """Return the score of a case with right continuations and perhaps wrong ones."""
    case, n_right = encoded.case, encoded.case.n_right
    results = [likelihoods[query] for query in encoded.queries]
    right, first = results[:n_right], results[0]
    greedy = any(result.greedy for result in right)
    comparison = None
    if len(results) > n_right:
        logprobs = candidate_logprobs(tokenizer, encoded, likelihoods)
        comparison = compare_candidates(logprobs, n_right, case.scoring)
    has_prompt = case.type != "minimal_pair"  # the whole text of a pair is scored
    top = [
        (tokenizer.token_bytes(token).decode(errors="replace"), p)
        for token, p in first.top
        if has_prompt
    ]
    return Score(
        case,
        correct=comparison.correct if comparison else float(greedy),
        merged=encoded.merged,
        logprob=log_sum_exp([result.logprob for result in right]),
        tokens=len(first.logprobs),
        bytes=len(case.candidates[0][1].encode()),
        greedy=greedy if has_prompt else None,
        first_token_rank=min(result.rank for result in right) if has_prompt else None,
        top=tuple(top),
        comparison=comparison,
    )


def candidate_logprobs(
    tokenizer: Tokenizer, encoded: EncodedCase, likelihoods: Mapping[Query, Likelihood]
) -> dict[str, list[float]]:
    """Return the candidates' log-probabilities: in total, per token, per byte, and as PMI.

    Raises UserError if the case is scored by PMI and has no PMI queries.
    """
    case = encoded.case
    results = [likelihoods[query] for query in encoded.queries]
    sums = [result.logprob for result in results]
    sizes = [len(continuation.encode()) for _, continuation in case.candidates]
    pairs = zip(sums, results, strict=True)
    logprobs = {
        "sum": sums,
        "token": [total / len(result.logprobs) for total, result in pairs],
        "byte": [total / size for total, size in zip(sums, sizes, strict=True)],
    }
    if encoded.pmi_queries:
        alone = [likelihoods[query].logprob for query in encoded.pmi_queries]
        logprobs["pmi"] = [total - each for total, each in zip(sums, alone, strict=True)]
    if case.scoring not in logprobs:
        raise UserError(
            f"the case {case.id!r} is scored by pmi, for which {tokenizer.name!r} has no token "
            "that begins a document; add a pmi_prompt"
        )
    return logprobs


def score_text(encoded: EncodedCase, likelihoods: Mapping[Query, Likelihood]) -> Score:
    """Return the bits per byte of a text, over all its windows."""
    results = [likelihoods[query] for query in encoded.queries]
    loss_sum = -math.fsum(result.logprob for result in results)
    size = len(case_text(encoded.case).encode())
    return Score(
        encoded.case,
        correct=None,
        tokens=sum(len(result.logprobs) for result in results),
        bytes=size,
        bits_per_byte=loss_sum / math.log(2) / size,
    )


def score_generation(model: Transformer, tokenizer: Tokenizer, encoded: EncodedCase) -> Score:
    """Decode greedily after the prompt, and compare the text with the case's patterns."""
    case, [query] = encoded.case, encoded.queries
    params = SamplingParams(max_new_tokens=case.max_new_tokens, temperature=0.0)
    [text] = generate_texts(model, tokenizer, [[*query.context]], params)
    matches = re.search(case.match, text) is not None
    forbidden = bool(case.forbid) and re.search(case.forbid, text) is not None
    return Score(case, float(matches and not forbidden), generated=text)
