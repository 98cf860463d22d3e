"""Results of checkpoints on a suite: accuracies with intervals, by category and over training.

`evaluate(paths, suite)` returns a `Result` for each checkpoint, the best first. `summarise` gives
the numbers of one category. The headline is the macro accuracy: the mean over the categories.
A score is graded if its case has a right and a wrong outcome, which texts have not.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.evaluation.cases import Suite
from pocketlm.evaluation.scoring import EncodedCase, Score, encode_case, score_cases
from pocketlm.evaluation.statistics import (
    ClusterBootstrap,
    Counts,
    Floats,
    Interval,
    cluster_bootstrap,
    effective_sample_size,
    macro_mean,
    mean_interval,
    wilson_interval,
)

SCORINGS = ("sum", "token", "byte", "pmi")

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Result:
    """A checkpoint and its scores. `names` are all files with these weights."""

    names: list[str]
    step: int
    tokens: int
    val_loss: float | None
    weights_sha256: str
    tokenizer_sha256: str
    scores: list[Score]

    @property
    def finite(self) -> bool:
        """False if a score is infinite or NaN, as with broken weights."""
        return all(score.finite for score in self.scores)

    @cached_property
    def graded(self) -> list[Score]:
        """The scores of all cases but texts."""
        return [score for score in self.scores if score.correct is not None]

    @cached_property
    def correct(self) -> Floats:
        """Points of each graded case: 1 right, 0 wrong, a share of 1 for a tie."""
        return np.array([score.correct for score in self.graded])

    @cached_property
    def categories(self) -> list[str]:
        """Category of each graded case."""
        return [score.case.category for score in self.graded]

    @property
    def category_names(self) -> list[str]:
        """The categories of the graded cases, each once, in the order of the suite."""
        return list(dict.fromkeys(self.categories))

    @cached_property
    def bootstrap(self) -> ClusterBootstrap:
        """Bootstrap samples of the graded cases."""
        groups = tuple(score.case.group for score in self.graded)
        return cluster_bootstrap(tuple(self.categories), groups)

    @cached_property
    def macro(self) -> float:
        """Mean over categories of each category's accuracy; NaN without graded cases."""
        return macro_mean(self.correct, self.categories) if self.graded else math.nan

    @cached_property
    def macro_interval(self) -> Interval:
        """MOVER interval of the macro accuracy."""
        return mean_interval([self.counts(self.mask(name)) for name in self.category_names])

    @cached_property
    def mean_logprob(self) -> float | None:
        """Mean over cases of the right continuations' log-probability, in nats."""
        return mean([score.logprob for score in self.scores])

    def mask(self, category: str | None) -> Mask:
        """Return which graded cases are in the category; None is all of them."""
        return np.array([category in (None, each) for each in self.categories], dtype=bool)

    def counts(self, mask: Mask) -> Counts:
        """Return (correct, n) of the graded cases in `mask`; n is their effective sample size."""
        groups = [
            score.case.group for score, inside in zip(self.graded, mask, strict=True) if inside
        ]
        n = effective_sample_size(self.correct[mask], groups)
        return float(self.correct[mask].mean()) * n, n

    def difference_from(self, other: "Result") -> tuple[float, Interval]:
        """Return the difference of the macro accuracies and its paired bootstrap interval."""
        return self.macro - other.macro, self.bootstrap.macro(self.correct - other.correct)


@dataclass(frozen=True)
class Summary:
    """The numbers of one category, or of all graded cases. A field is None if no case has it."""

    n: int
    ties: int
    accuracy: float
    interval: Interval  # of the accuracy: Wilson, with the effective sample size
    chance: float  # accuracy of guessing; 0 for cases without candidates to choose from
    centred: float  # (accuracy - chance) / (1 - chance): 0 is guessing, 1 is perfect
    by: dict[str, float]  # accuracy under each scoring: sum, token, byte, pmi
    p_correct: float | None
    p_correct_interval: Interval | None  # cluster bootstrap
    margin: float | None
    brier: float | None
    logprob: float | None
    greedy: float | None
    mrr: float | None  # mean reciprocal rank of the right first token in the vocabulary
    top1: float | None  # share of right first tokens with rank 1
    topk: float | None


def summarise(result: Result, category: str | None, top_k: int) -> Summary:
    """Return the summary of one category, or of all graded cases (micro average) for None."""
    mask = result.mask(category)
    scores = [score for score, inside in zip(result.graded, mask, strict=True) if inside]
    accuracy = float(result.correct[mask].mean())
    chance = math.fsum(score.case.chance or 0.0 for score in scores) / len(scores)
    p = np.array([math.nan if s.p_correct is None else s.p_correct for s in result.graded])
    compared = np.flatnonzero(mask & ~np.isnan(p))
    ranks = [score.first_token_rank for score in scores if score.first_token_rank]
    return Summary(
        n=len(scores),
        ties=sum(score.tie for score in scores),
        accuracy=accuracy,
        interval=wilson_interval(*result.counts(mask)),
        chance=chance,
        centred=(accuracy - chance) / (1 - chance),
        by=accuracy_by_scoring(scores),
        p_correct=mean([score.p_correct for score in scores]),
        p_correct_interval=result.bootstrap.mean(p, compared) if len(compared) else None,
        margin=mean([score.margin for score in scores]),
        brier=mean([score.brier for score in scores]),
        logprob=mean([score.logprob for score in scores]),
        greedy=mean([score.greedy for score in scores]),
        mrr=mean([1 / rank for rank in ranks]),
        top1=mean([rank == 1 for rank in ranks]),
        topk=mean([rank <= top_k for rank in ranks]),
    )


def accuracy_by_scoring(scores: list[Score]) -> dict[str, float]:
    """Return the accuracy under each scoring, over the cases that have it."""
    accuracies = {}
    for scoring in SCORINGS:
        accuracy = mean([score.correct_by.get(scoring) for score in scores])
        if accuracy is not None:
            accuracies[scoring] = accuracy
    return accuracies


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None


def summaries_by_category(result: Result, top_k: int) -> dict[str, Summary]:
    """Return the summary of each category, and of all graded cases as "micro"."""
    summaries = {name: summarise(result, name, top_k) for name in result.category_names}
    if result.graded:
        summaries["micro"] = summarise(result, None, top_k)
    return summaries


# ---- over training ----


def by_step(results: list[Result]) -> list[Result]:
    """Return the results in the order of their steps."""
    return sorted(results, key=lambda result: result.step)


def first_step_above_chance(results: list[Result], category: str) -> int | None:
    """Return the first step from which the accuracy's interval stays above chance, or None."""
    first = None
    for result in by_step(results):
        summary = summarise(result, category, 1)
        if summary.interval[0] <= summary.chance:
            first = None
        elif first is None:
            first = result.step
    return first


def learned_and_forgotten(before: Result, after: Result) -> tuple[list[str], list[str]]:
    """Return the ids of the cases that `after` scores higher than `before`, and of those lower."""
    learned, forgotten = [], []
    for old, new in zip(before.graded, after.graded, strict=True):
        assert old.correct is not None
        assert new.correct is not None
        if old.correct < new.correct:
            learned.append(new.case.id)
        elif old.correct > new.correct:
            forgotten.append(new.case.id)
    return learned, forgotten


# ---- evaluating checkpoints ----


def evaluate(
    paths: list[str], suite: Suite, tokenizer_name: str | None = None, top_k: int = 5
) -> list[Result]:
    """Return the results of the checkpoints, the best first, those that are not finite last.

    Files with equal weights and tokenizer share a result. Cases are encoded once per tokenizer and
    context length. Raises UserError if a checkpoint was not trained with `tokenizer_name`.
    """
    results: dict[tuple[str, str], Result] = {}
    encoded: dict[tuple[str, int], list[EncodedCase]] = {}
    for path in paths:
        checkpoint = load_checkpoint(path, tokenizer_name)
        identity = checkpoint.weights_sha256, checkpoint.tokenizer.fingerprint
        if identity in results:
            results[identity].names.append(path)
            continue
        print(f"scoring {path}", file=sys.stderr)
        tokenizer, max_seq_len = checkpoint.tokenizer, checkpoint.model.max_seq_len
        key = (tokenizer.fingerprint, max_seq_len)
        if key not in encoded:
            encoded[key] = [encode_case(tokenizer, case, max_seq_len) for case in suite.cases]
        scores = score_cases(checkpoint.model, tokenizer, encoded[key], top_k)
        results[identity] = Result(
            [path], checkpoint.step, checkpoint.tokens, checkpoint.val_loss, *identity, scores
        )
    return sorted(results.values(), key=ranking_key)


def ranking_key(result: Result) -> tuple[float, ...]:
    """Return the sort key of a result; the smallest is the best.

    The order is by macro accuracy, then by the log-probability of the right continuations, then by
    bits per byte. Results that are not finite come last.
    """
    if not result.finite:
        return (1,)
    bits = mean([score.bits_per_byte for score in result.scores])
    macro = result.macro if result.graded else 0.0
    return 0, -macro, -(result.mean_logprob or 0.0), bits or 0.0
