"""How sure a score is: intervals for one checkpoint, and for the difference of two on the same cases.

Cases of one group (paraphrases of a fact) are drawn together, since they are right or wrong together. All draws come from a
seed of their own, so that the same scores give the same intervals.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

DRAWS, SEED, LEVEL = 2000, 0, 0.95


Z = 1.959963984540054  # of the normal distribution, two-sided 95 %


Interval = tuple[float, float]


def wilson(correct: float, n: float) -> Interval:
    """Wilson's interval of a proportion (Wilson 1927); both may be fractions, of ties shared out and of `independent`.

    >>> tuple(round(x, 3) for x in wilson(6, 8))
    (0.409, 0.929)
    """
    p, zz = correct / n, Z * Z / n
    q = 1 - p
    half = zz / 2 + math.sqrt(zz * p * q + zz * zz / 4)
    return p * p / (p + half), 1 - q * q / (
        q + half
    )  # nothing cancels: of nothing right, the lower end is exactly 0


def independent(correct: np.ndarray, groups: Sequence[str]) -> float:
    """How many independent cases say as much as these, whose groups may be right or wrong together (Kish's design effect).

    How far they are, the cases themselves say, and one more that takes groups to be wholly alike: where all cases are right,
    or all wrong, nothing else speaks.

    >>> independent(np.array([1.0, 1, 0, 0]), ["a", "a", "b", "b"]), independent(np.array([1.0, 0, 1, 0]), ["a", "a", "b", "b"])
    (2.0, 4.0)
    """
    _, of = np.unique(groups, return_inverse=True)
    apart = correct - correct.mean()
    together, sizes = np.bincount(of, apart), np.bincount(of)
    return len(correct) / max(
        1.0, float((together @ together + sizes @ sizes / len(correct)) / (apart @ apart + 1))
    )


def mean_of_proportions(proportions: Sequence[tuple[float, float]]) -> Interval:
    """The interval of the plain mean of proportions (correct, n), out of Wilson's of each (MOVER, Zou & Donner 2008).

    A bootstrap would call a checkpoint that has nothing right certain of its zero.
    """
    means = [correct / n for correct, n in proportions]
    limits = [wilson(correct, n) for correct, n in proportions]
    middle, k = sum(means) / len(means), len(means)
    below = (
        math.sqrt(sum((mean - low) ** 2 for mean, (low, _) in zip(means, limits, strict=True))) / k
    )
    above = (
        math.sqrt(sum((high - mean) ** 2 for mean, (_, high) in zip(means, limits, strict=True)))
        / k
    )
    return middle - below, middle + above


class Resamples:
    """DRAWS ways to draw the cases again, whole groups at a time, within each category."""

    def __init__(self, categories: Sequence[str], groups: Sequence[str]):
        rng = np.random.default_rng(SEED)
        self.drawn: list[
            tuple[np.ndarray, np.ndarray]
        ] = []  # of each category: its cases, how often each is drawn (DRAWS, n)
        for category in dict.fromkeys(categories):
            inside = np.flatnonzero(np.array(categories) == category)
            names, of = np.unique(np.array(groups)[inside], return_inverse=True)
            drawn = (
                rng.integers(len(names), size=(DRAWS, len(names)))
                + len(names) * np.arange(DRAWS)[:, None]
            )
            times = (
                np.bincount(drawn.ravel(), minlength=drawn.size)
                .astype(np.uint16)
                .reshape(drawn.shape)
            )  # each group is drawn
            self.drawn.append((inside, times[:, of]))

    def mean(self, values: np.ndarray, of: np.ndarray | None = None) -> Interval:
        """The interval of the mean of values (n,), or of those at `of` only; a draw that has none of them does not count."""
        chosen = np.zeros(len(values), bool)
        chosen[slice(None) if of is None else of] = True
        sums, counts = np.zeros(DRAWS), np.zeros(DRAWS)
        for inside, times in self.drawn:
            here = chosen[inside]
            sums += times[:, here] @ values[inside[here]]
            counts += times[:, here].sum(1)
        return percentiles(sums[counts > 0] / counts[counts > 0])

    def macro(self, values: np.ndarray) -> Interval:
        """The interval of the mean over categories of the categories' means."""
        return percentiles(
            np.mean([times @ values[inside] / times.sum(1) for inside, times in self.drawn], axis=0)
        )


@lru_cache(maxsize=1)
def resamples(categories: tuple[str, ...], groups: tuple[str, ...]) -> Resamples:
    """The draws, made once for all checkpoints that have answered the same cases."""
    return Resamples(categories, groups)


def percentiles(draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def macro_mean(values: np.ndarray, categories: Sequence[str]) -> float:
    """The mean over categories of the categories' means."""
    of = np.array(categories)
    return float(np.mean([values[of == category].mean() for category in dict.fromkeys(categories)]))


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """Cases that only the first has right, those that only the second has, and the exact two-sided p-value (McNemar 1947).

    >>> mcnemar(np.array([1.0, 1, 1, 1, 1, 1, 0, 1]), np.array([0.0, 0, 0, 0, 0, 0, 0, 1]))
    (6, 0, 0.03125)
    """
    wins, losses = int((first > second).sum()), int((first < second).sum())
    n, tail, ways = wins + losses, 0, 1
    for k in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)  # n choose k + 1
    return wins, losses, min(1.0, 2 * tail / 2**n)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None where one of them does not vary."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    a, b = ranks(x), ranks(y)
    return None if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])
