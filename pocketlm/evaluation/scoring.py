"""What a model makes of probe cases: log-probabilities of whole continuations, from as few forward passes as will do.

Context and continuation are encoded as one text, behind the token that begins a document. Requests that share a context share
its forward pass and its cached keys and values; contexts of one length go in one batch, so that nothing is padded before a
continuation. Log-probabilities are natural, in float32, of every token of the continuation.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model import Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import Case
from pocketlm.evaluation.likelihood import Likelihood, Query, query_likelihoods
from pocketlm.inference.generate import generate
from pocketlm.tokenizer.base import Tokenizer

TIE = 1e-4  # nats: what rounding of float32 makes of two equal sums of some 20 log-probabilities


# ---- cases -> requests -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedCase:
    """A case as requests: one for each candidate, and for each the same continuation by itself (for PMI)."""

    case: Case
    requests: tuple[Query, ...]
    alone: tuple[Query, ...] = ()
    merged: bool = False  # the tokenizer joins the end of a context and the begin of its continuation in one token


def encode_case(tokenizer: Tokenizer, case: Case, context: int) -> EncodedCase:
    """Raises UserError for a case that does not fit the model's context, or with nothing before what is asked."""
    pairs = [encode_pair(tokenizer, *candidate) for candidate in case.candidates]
    alone = []
    if case.type == "text":
        requests = list(windows(tokenizer, text_of(case), context))
    elif case.type == "generate":
        requests = [Query((*tokenizer.prefix, *tokenizer.encode(case.prompt)), ())]
    elif case.type == "schema":
        requests = [Query(ids[:start], ids[start:]) for ids, start, _ in pairs]
    else:
        requests = of_one_context(pairs)
        if (
            case.type != "minimal_pair"
            and case.distractors
            and (tokenizer.prefix or case.pmi_prompt)
        ):
            alone = of_one_context(
                [
                    encode_pair(tokenizer, case.pmi_prompt, continuation)
                    for _, continuation in case.candidates
                ]
            )
    for request in (*requests, *alone):
        if not request.context:
            raise UserError(
                f"the case {case.id!r} has nothing before what is asked, and no token begins a document in {tokenizer.name!r}"
            )
        if (n := len(request.context) + len(request.continuation)) > context + bool(
            request.continuation
        ):
            raise UserError(
                f"the case {case.id!r} has {n} tokens and the model a context of {context}; shorten it"
            )
    if not requests or not (
        case.type == "generate" or all(request.continuation for request in (*requests, *alone))
    ):
        raise UserError(
            f"the case {case.id!r} asks for a text that has no token in {tokenizer.name!r}; change it"
        )
    return EncodedCase(case, tuple(requests), tuple(alone), any(merged for _, _, merged in pairs))


def of_one_context(pairs: list[tuple[tuple[int, ...], int, bool]]) -> list[Query]:
    """Requests that begin together, where the first of them begins: a token that joins one to the context is asked of all.

    Without any context it is what they have in common in front, which decides nothing between them.
    """
    whole = [ids for ids, _, _ in pairs]
    common = next(
        (i for i, tokens in enumerate(zip(*whole, strict=False)) if len(set(tokens)) > 1), 0
    )
    start = min(start for _, start, _ in pairs) or common
    return [Query(ids[:start], ids[start:]) for ids in whole]


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[tuple[int, ...], int, bool]:
    """Ids of prefix, context and continuation, encoded as one text; where the continuation begins; whether a token joins both.

    Where one does, the continuation begins with it.
    """
    both, alone = tokenizer.encode(context + continuation), tokenizer.encode(context)
    shared = next(
        (i for i, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b),
        min(len(alone), len(both)),
    )
    return (*tokenizer.prefix, *both), len(tokenizer.prefix) + shared, shared < len(alone)


def text_of(case: Case) -> str:
    try:
        return case.text or Path(case.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the case {case.id!r} reads {case.file}: {error}") from None


def windows(tokenizer: Tokenizer, text: str, context: int) -> Iterator[Query]:
    """The text in windows at the model's context: every token is asked once. The last one reaches back over tokens asked before."""
    ids = (*tokenizer.prefix, *tokenizer.encode(text))
    for start in range(1, len(ids), context):
        end = min(start + context, len(ids))
        yield Query(ids[max(0, end - 1 - context) : start], ids[start:end])


# ---- answers -> scores -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What a checkpoint makes of a case. None: the type of case has no such number."""

    case: Case
    correct: float | None  # 1 right, 0 wrong; 1/k of a tie between k; by the case's own scoring
    correct_by: dict[str, float] = field(
        default_factory=dict
    )  # the same by sum, token, byte and pmi
    tie: bool = False
    merged: bool = False
    logprob: float | None = (
        None  # nats, of the right continuation; of all accepted answers together
    )
    tokens: int = 0  # of the first right continuation
    bytes: int = 0
    greedy: bool | None = None  # greedy generation writes an accepted answer
    first_token_rank: int | None = None
    top: tuple[tuple[str, float], ...] = ()  # the likeliest next tokens
    rank: int | None = None  # of the best right candidate among the candidates
    p_correct: float | None = None  # softmax over the candidates' log-probabilities
    margin: float | None = None  # nats between the best right and the best wrong one
    brier: float | None = (
        None  # squared distance of the candidates' probabilities from the truth, 0 to 2
    )
    generated: str = ""
    bits_per_byte: float | None = None

    @property
    def finite(self) -> bool:
        return all(
            math.isfinite(x)
            for x in (self.logprob, self.p_correct, self.bits_per_byte)
            if x is not None
        )


def score_cases(
    model: Transformer, tokenizer: Tokenizer, encoded: list[EncodedCase], top_k: int = 5
) -> list[Score]:
    """The score of each case."""
    requests = [
        request for e in encoded if e.case.type != "generate" for request in (*e.requests, *e.alone)
    ]
    answers = query_likelihoods(model, requests, top_k)
    return [
        score_generated(model, tokenizer, e)
        if e.case.type == "generate"
        else score_case(tokenizer, e, answers)
        for e in encoded
    ]


def score_case(
    tokenizer: Tokenizer, encoded: EncodedCase, answers: dict[Query, Likelihood]
) -> Score:
    case = encoded.case
    found = [answers[request] for request in encoded.requests]
    if case.type == "text":
        nats, size = -math.fsum(a.logprob for a in found), len(text_of(case).encode())
        return Score(
            case,
            None,
            tokens=sum(len(a.logprobs) for a in found),
            bytes=size,
            bits_per_byte=nats / math.log(2) / size,
        )
    right, n = found[: case.n_right], case.n_right
    sums = [a.logprob for a in found]
    sizes = [len(continuation.encode()) for _, continuation in case.candidates]
    first = right[0]
    common = dict(
        case=case,
        merged=encoded.merged,
        logprob=log_sum_exp(sums[:n]),
        tokens=len(first.logprobs),
        bytes=sizes[0],
    )
    if case.type != "minimal_pair":  # a whole text, of which no prompt asks for the first token
        common |= dict(
            greedy=any(a.greedy for a in right),
            first_token_rank=min(a.rank for a in right),
            top=tuple((tokenizer.decode([token]), p) for token, p in first.top),
        )
    if len(found) == n:
        return Score(correct=float(common["greedy"]), **common)
    by = {
        "sum": sums,
        "token": [total / len(a.logprobs) for total, a in zip(sums, found, strict=True)],
        "byte": [total / size for total, size in zip(sums, sizes, strict=True)],
    }
    if encoded.alone:
        by["pmi"] = [
            total - answers[alone].logprob for total, alone in zip(sums, encoded.alone, strict=True)
        ]
    credits = {name: credit(values, n) for name, values in by.items()}
    if case.scoring not in by:
        raise UserError(
            f"the case {case.id!r} is scored by pmi, for which {tokenizer.name!r} has no token that begins a document"
        )
    total = log_sum_exp(sums)
    p = [math.exp(value - total) for value in sums]
    p_correct = math.fsum(p[:n])
    values = by[case.scoring]
    best_right = max(values[:n])
    return Score(
        correct=credits[case.scoring][0],
        correct_by={name: value for name, (value, _) in credits.items()},
        tie=credits[case.scoring][1],
        rank=1 + sum(value > best_right + TIE for value in values[n:]),
        p_correct=p_correct,
        margin=best_right - max(values[n:]),
        brier=(1 - p_correct) ** 2 + math.fsum(wrong**2 for wrong in p[n:]),
        **common,
    )


def credit(values: list[float], n_right: int) -> tuple[float, bool]:
    """1 where a right one (the first n_right) has the largest value, 1/k of a tie between k for each right one in it; is it a tie?

    >>> credit([-1.0, -2.0], 1), credit([-1.0, -1.0, -3.0], 1), credit([-4.0, -1.0], 1)
    ((1.0, False), (0.5, True), (0.0, False))
    """
    best = max(values)
    winners = [i for i, value in enumerate(values) if value >= best - TIE]
    right = sum(i < n_right for i in winners)
    return right / max(1, len(winners)), 0 < right < len(
        winners
    )  # none wins where one is not a number


def score_generated(model: Transformer, tokenizer: Tokenizer, encoded: EncodedCase) -> Score:
    """Greedy text against the case's patterns."""
    case, [request] = encoded.case, encoded.requests
    params = SamplingParams(max_new_tokens=case.max_new_tokens, temperature=0.0)
    rows = generate(model, torch.tensor([request.context]), params, tokenizer.eos_id)
    text = tokenizer.decode([token for [token] in rows if token is not None])
    right = re.search(case.match, text) is not None and not (
        case.forbid and re.search(case.forbid, text)
    )
    return Score(case, float(right), generated=text)


def log_sum_exp(values: list[float]) -> float:
    """
    >>> round(log_sum_exp([math.log(0.25), math.log(0.5)]) - math.log(0.75), 12)
    0.0
    """
    top = max(values)
    return (
        top + math.log(math.fsum(math.exp(value - top) for value in values))
        if math.isfinite(top)
        else top
    )
