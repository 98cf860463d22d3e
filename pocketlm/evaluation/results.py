"""What a checkpoint's scores come to: its accuracy with an interval, by category, against another's, and over training."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.evaluation import statistics as intervals
from pocketlm.evaluation.cases import Suite
from pocketlm.evaluation.scoring import EncodedCase, Score, encode_case, score_cases
from pocketlm.evaluation.statistics import Interval


@dataclass(frozen=True)
class Result:
    """A checkpoint and its scores. `names` are all the files with these weights."""

    names: list[str]
    step: int
    tokens: int
    val_loss: float | None
    weights_sha256: str
    tokenizer_sha256: str
    scores: list[Score]

    @property
    def finite(self) -> bool:
        return all(score.finite for score in self.scores)

    @cached_property
    def graded(self) -> list[Score]:
        """The scores that are right or wrong: all but those of texts."""
        return [score for score in self.scores if score.correct is not None]

    @cached_property
    def correct(self) -> np.ndarray:
        return np.array([score.correct for score in self.graded])

    @cached_property
    def categories(self) -> list[str]:
        """Of each graded case."""
        return [score.case.category for score in self.graded]

    @cached_property
    def resamples(self) -> intervals.Resamples:
        return intervals.resamples(
            tuple(self.categories), tuple(score.case.group for score in self.graded)
        )

    @cached_property
    def macro(self) -> float:
        """Accuracy, the mean over categories: the headline."""
        return intervals.macro_mean(self.correct, self.categories) if self.graded else math.nan

    @cached_property
    def macro_interval(self) -> Interval:
        of = np.array(self.categories)
        return intervals.mean_of_proportions(
            [self.share(of == category) for category in dict.fromkeys(self.categories)]
        )

    def share(self, of: np.ndarray) -> tuple[float, float]:
        """(right, n) of the graded cases `of`, for an interval: n is of independent cases."""
        groups = [score.case.group for score, inside in zip(self.graded, of, strict=True) if inside]
        n = intervals.independent(self.correct[of], groups)
        return float(self.correct[of].mean()) * n, n

    @cached_property
    def mean_logprob(self) -> float:
        """Nats of the right continuations, where there are such."""
        return mean([score.logprob for score in self.scores])

    def difference_from(self, other: "Result") -> tuple[float, Interval]:
        """Difference of the two headlines, and its interval over the same cases, drawn in pairs."""
        apart = self.correct - other.correct
        return self.macro - other.macro, self.resamples.macro(apart)


@dataclass(frozen=True)
class Summary:
    """A category, or all cases together, under one checkpoint. None: no case there has such a number."""

    n: int
    ties: int
    accuracy: float
    interval: Interval  # of the accuracy: Wilson's, with the groups' dependence
    chance: float  # what guessing scores; 0 where there is nothing to choose from
    centred: float  # (accuracy - chance) / (1 - chance): 0 is guessing, 1 is perfect
    by: dict[str, float]  # accuracy where candidates are compared by sum, token, byte, pmi
    p_correct: float | None
    p_correct_interval: Interval | None  # by cluster bootstrap
    margin: float | None
    brier: float | None
    logprob: float | None
    greedy: float | None
    mrr: float | None  # of the right continuation's first token, among all tokens
    top1: float | None
    topk: float | None


def summarise(result: Result, category: str | None, top_k: int) -> Summary:
    """Of one category, or of all graded cases (the micro average)."""
    of = np.array([category in (None, each) for each in result.categories])
    scores = [score for score, inside in zip(result.graded, of, strict=True) if inside]
    accuracy, chance = (
        float(result.correct[of].mean()),
        mean([score.case.chance or 0.0 for score in scores]),
    )
    p = np.array(
        [math.nan if score.p_correct is None else score.p_correct for score in result.graded]
    )
    chosen = np.flatnonzero(of & ~np.isnan(p))
    ranks = [score.first_token_rank for score in scores if score.first_token_rank]
    return Summary(
        n=len(scores),
        ties=sum(score.tie for score in scores),
        accuracy=accuracy,
        interval=intervals.wilson(*result.share(of)),
        chance=chance,
        centred=(accuracy - chance) / (1 - chance),
        by={
            name: mean(values)
            for name in ("sum", "token", "byte", "pmi")
            if (values := correct_by(scores, name))
        },
        p_correct=mean([score.p_correct for score in scores]),
        p_correct_interval=result.resamples.mean(p, chosen) if len(chosen) else None,
        margin=mean([score.margin for score in scores]),
        brier=mean([score.brier for score in scores]),
        logprob=mean([score.logprob for score in scores]),
        greedy=mean([score.greedy for score in scores]),
        mrr=mean([1 / rank for rank in ranks]),
        top1=mean([rank == 1 for rank in ranks]),
        topk=mean([rank <= top_k for rank in ranks]),
    )


def correct_by(scores: list[Score], name: str) -> list[float]:
    return [score.correct_by[name] for score in scores if name in score.correct_by]


def mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def first_step_above_chance(results: list[Result], category: str) -> int | None:
    """The first step at which the interval of a category's accuracy lies above chance, and stays there."""
    first = None
    for result in sorted(results, key=lambda r: r.step):
        summary = summarise(result, category, 1)
        above = summary.interval[0] > summary.chance
        first = (result.step if first is None else first) if above else None
    return first


def learned_and_forgotten(before: Result, after: Result) -> tuple[list[str], list[str]]:
    """Ids of the cases that were learned from one checkpoint to the next, and of those that were forgotten."""
    pairs = list(zip(before.graded, after.graded, strict=True))
    return [b.case.id for a, b in pairs if a.correct < b.correct], [
        b.case.id for a, b in pairs if a.correct > b.correct
    ]


# ---- checkpoints -> results ------------------------------------------------------------------------------------------


def evaluate(
    paths: list[str], suite: Suite, tokenizer_name: str | None = None, top_k: int = 5
) -> list[Result]:
    """A result for each set of weights, the best first and those with numbers that are not finite last.

    Files with the same weights and tokenizer share one; cases are encoded once for each tokenizer.
    """
    results: dict[tuple[str, str], Result] = {}
    encoded: dict[tuple[str, int], list[EncodedCase]] = {}
    for path in paths:
        checkpoint = load_checkpoint(path, tokenizer_name)
        identity = checkpoint.weights_sha256, checkpoint.tokenizer.fingerprint
        if same := results.get(identity):
            same.names.append(path)
            continue
        print(f"scoring {path}", file=sys.stderr)
        tokenizer, context = checkpoint.tokenizer, checkpoint.model.config.max_seq_len
        if (key := (tokenizer.fingerprint, context)) not in encoded:
            encoded[key] = [encode_case(tokenizer, case, context) for case in suite.cases]
        scores = score_cases(checkpoint.model, tokenizer, encoded[key], top_k)
        results[identity] = Result(
            [path], checkpoint.step, checkpoint.tokens, checkpoint.val_loss, *identity, scores
        )
    return sorted(results.values(), key=ranking_key)


def ranking_key(result: Result) -> tuple:
    """What results are sorted by: accuracy over categories, then the log-probability of what is right, then bits per byte."""
    if not result.finite:
        return (1,)
    bits = mean([score.bits_per_byte for score in result.scores])
    return 0, -(result.macro if result.graded else 0.0), -(result.mean_logprob or 0.0), bits or 0.0
