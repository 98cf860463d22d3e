"""Confidence intervals and tests for scores on probe cases.

An accuracy has a Wilson interval, the mean of several a MOVER interval, and other means and paired
differences a cluster bootstrap interval. Cases of one group (paraphrases of a fact) tend to be
right or wrong together: the Wilson interval counts the effective sample size, and the bootstrap
draws whole groups. The bootstrap has its own fixed seed, so that equal scores give equal intervals.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DRAWS, SEED, LEVEL = 2000, 0, 0.95
Z = 1.959963984540054  # quantile of the normal distribution for a two-sided 95 % interval

Interval = tuple[float, float]
Floats = NDArray[np.float64]
Counts = tuple[float, float]  # (number correct, sample size), both possibly fractional


# ---- proportions ----


def wilson_interval(correct: float, n: float) -> Interval:
    """Return the Wilson score interval of a proportion (Wilson 1927, JASA 22).

    Both arguments may be fractions: ties share a point, and n may be an effective sample size.

    >>> tuple(round(x, 3) for x in wilson_interval(6, 8))
    (0.409, 0.929)
    """
    p = correct / n
    q = 1 - p
    z2 = Z * Z / n
    half = z2 / 2 + math.sqrt(z2 * p * q + z2 * z2 / 4)
    # In this form nothing cancels: if nothing is correct, the lower limit is exactly 0.
    return p * p / (p + half), 1 - q * q / (q + half)


def effective_sample_size(correct: Floats, groups: Sequence[str]) -> float:
    """Return the number of cases divided by the design effect of their groups (Kish 1965).

    The design effect is estimated from the data: the variance of the group totals over the variance
    of independent cases. It is never below 1. One pseudo-observation of an intra-cluster
    correlation of 1 keeps it defined where all cases are correct, or all are wrong.

    >>> correct, groups = np.array([1.0, 1, 0, 0]), ["a", "a", "b", "b"]
    >>> effective_sample_size(correct, groups)
    2.0
    >>> effective_sample_size(np.array([1.0, 0, 1, 0]), groups)
    4.0
    """
    _, group_of_case = np.unique(groups, return_inverse=True)
    deviations = correct - correct.mean()
    group_totals = np.bincount(group_of_case, deviations)
    sizes = np.bincount(group_of_case)
    between_groups = group_totals @ group_totals + sizes @ sizes / len(correct)
    independent = deviations @ deviations + 1
    return len(correct) / max(1.0, float(between_groups / independent))


def mean_interval(counts: Sequence[Counts]) -> Interval:
    """Return the interval of the unweighted mean of proportions (MOVER: Zou & Donner 2008).

    It combines the Wilson interval of each proportion. A bootstrap would give a checkpoint that has
    nothing right an interval of width 0.
    """
    k = len(counts)
    proportions = [correct / n for correct, n in counts]
    intervals = [wilson_interval(correct, n) for correct, n in counts]
    pairs = list(zip(proportions, intervals, strict=True))
    below = math.sqrt(sum((p - low) ** 2 for p, (low, _) in pairs)) / k
    above = math.sqrt(sum((high - p) ** 2 for p, (_, high) in pairs)) / k
    mean = sum(proportions) / k
    return mean - below, mean + above


def macro_mean(values: Floats, categories: Sequence[str]) -> float:
    """Return the mean over categories of each category's mean."""
    labels = np.array(categories)
    means = [values[labels == category].mean() for category in dict.fromkeys(categories)]
    return float(np.mean(means))


# ---- bootstrap ----


class ClusterBootstrap:
    """DRAWS bootstrap samples of the cases, drawn by whole groups within each category.

    `draws` holds for each category the indices of its cases (n,) and the number of times that each
    sample contains each of them (DRAWS, n).
    """

    def __init__(self, categories: Sequence[str], groups: Sequence[str]):
        rng = np.random.default_rng(SEED)
        self.draws: list[tuple[NDArray[np.intp], NDArray[np.uint16]]] = []
        for category in dict.fromkeys(categories):
            cases = np.flatnonzero(np.array(categories) == category)
            names, group_of_case = np.unique(np.array(groups)[cases], return_inverse=True)
            n = len(names)
            drawn = rng.integers(n, size=(DRAWS, n)) + n * np.arange(DRAWS)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=drawn.size)
            group_counts = counts.astype(np.uint16).reshape(drawn.shape)
            self.draws.append((cases, group_counts[:, group_of_case]))

    def mean(self, values: Floats, chosen: NDArray[np.intp] | None = None) -> Interval:
        """Return the interval of the mean of `values` (n,), or of those with the indices `chosen`.

        Samples that contain none of the chosen cases are left out.
        """
        mask = np.zeros(len(values), bool)
        mask[slice(None) if chosen is None else chosen] = True
        sums, counts = np.zeros(DRAWS), np.zeros(DRAWS)
        for cases, times in self.draws:
            inside = mask[cases]
            sums += times[:, inside] @ values[cases[inside]]
            counts += times[:, inside].sum(1)
        return percentile_interval(sums[counts > 0] / counts[counts > 0])

    def macro(self, values: Floats) -> Interval:
        """Return the interval of the mean over categories of each category's mean."""
        means = [times @ values[cases] / times.sum(1) for cases, times in self.draws]
        return percentile_interval(np.mean(means, axis=0))


@lru_cache(maxsize=1)
def cluster_bootstrap(categories: tuple[str, ...], groups: tuple[str, ...]) -> ClusterBootstrap:
    """Return the samples for these cases; all checkpoints with the same cases share them."""
    return ClusterBootstrap(categories, groups)


def percentile_interval(draws: Floats) -> Interval:
    """Return the central LEVEL share of the draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# ---- tests ----


def mcnemar(first: Floats, second: Floats) -> tuple[int, int, float]:
    """Return the wins of the first, its losses, and the exact two-sided p-value (McNemar 1947).

    A win is a case with a higher score in `first`. Under the null hypothesis wins are binomial
    with p = 1/2 among all cases that differ.

    >>> mcnemar(np.array([1.0, 1, 1, 1, 1, 1, 0, 1]), np.array([0.0, 0, 0, 0, 0, 0, 0, 1]))
    (6, 0, 0.03125)
    """
    wins, losses = int((first > second).sum()), int((first < second).sum())
    n = wins + losses
    tail, binomial = 0, 1
    for k in range(min(wins, losses) + 1):
        tail += binomial
        binomial = binomial * (n - k) // (k + 1)  # n choose k + 1
    return wins, losses, min(1.0, 2 * tail / 2**n)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation (1904), or None if x or y is constant.

    >>> spearman([1, 2, 3], [10, 100, 50])
    0.5
    """
    x_ranks, y_ranks = mean_ranks(x), mean_ranks(y)
    if x_ranks.std() == 0 or y_ranks.std() == 0:
        return None
    return float(np.corrcoef(x_ranks, y_ranks)[0, 1])


def mean_ranks(values: Sequence[float]) -> Floats:
    """Return ranks from 1; tied values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = np.cumsum(counts) - (counts - 1) / 2
    return ranks[inverse]
