"""Intervals and tests, compared with simpler methods and with published examples.

The simpler methods are root finding, enumeration, and a slow bootstrap.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from pocketlm.evaluation.statistics import (
    DRAWS,
    ClusterBootstrap,
    Z,
    cluster_bootstrap,
    effective_sample_size,
    macro_mean,
    mcnemar,
    mean_interval,
    spearman,
    wilson_interval,
)

EXACT = 1e-12  # a dozen roundings of float64
CASES = 60
CATEGORIES = ["easy"] * 36 + ["hard"] * 24
GROUPS = [f"g{i * i % 17}" for i in range(CASES)]  # of one to seven cases


def values(seed: int = 0, n: int = CASES) -> np.ndarray:
    return np.random.default_rng(seed).random(n)


# ---- proportions ----


@pytest.mark.parametrize(
    "correct, n",
    [(0, 1), (1, 1), (0, 8), (6, 8), (8, 8), (100, 201), (0.5, 3), (7.25, 9), (2.5, 4.75)],
)
def test_wilsons_limits_are_the_proportions_whose_own_normal_test_just_accepts_what_was_seen(
    correct, n
):
    """Its definition, solved by bisection: |p - seen| = Z sqrt(p (1 - p) / n)."""
    seen = correct / n

    def accepted(p: float) -> bool:
        return abs(p - seen) <= Z * math.sqrt(p * (1 - p) / n)

    inside = seen
    if seen == 0:
        inside = 0.5 * Z**2 / (n + Z**2)
    elif seen == 1:
        inside = 0.5 * (1 + n / (n + Z**2))
    limits = [border(accepted, outside, inside) for outside in (0.0, 1.0)]
    # near 0 and 1, bisection loses half of the digits
    assert wilson_interval(correct, n) == pytest.approx(limits, abs=1e-9)


def border(accepted: Callable[[float], bool], outside: float, inside: float) -> float:
    """Bisect between a point that is not accepted and one that is."""
    for _ in range(200):
        middle = (outside + inside) / 2
        if accepted(middle):
            inside = middle
        else:
            outside = middle
    return inside


def test_the_lower_limit_of_nothing_right_is_exactly_0_and_the_upper_of_all_right_exactly_1():
    """Otherwise a checkpoint that has nothing right would be above chance."""
    for n in range(1, 500):
        assert wilson_interval(0, n)[0] == 0.0
        assert wilson_interval(n, n)[1] == 1.0


def test_the_interval_of_six_in_eight_is_as_wide_as_it_is():
    """Published with the method's usual example: 75 % of 8 is 41 % to 93 %."""
    assert wilson_interval(6, 8) == pytest.approx((0.4093, 0.9285), abs=5e-5)


def test_the_mean_of_one_proportion_has_wilsons_interval():
    assert mean_interval([(3, 7)]) == pytest.approx(wilson_interval(3, 7), abs=EXACT)


def test_the_mean_of_equal_proportions_is_surer_by_the_root_of_their_number():
    low, high = wilson_interval(3, 12)
    assert mean_interval([(3, 12)] * 4) == pytest.approx(
        (0.25 - (0.25 - low) / 2, 0.25 + (high - 0.25) / 2), abs=EXACT
    )


def test_a_mean_of_zeros_is_not_called_certain():
    low, high = mean_interval([(0, 10), (0, 12)])
    assert low == 0
    highs = [wilson_interval(0, n)[1] for n in (10, 12)]
    assert high == pytest.approx(math.hypot(*highs) / 2, abs=EXACT)


# ---- groups ----


@pytest.mark.parametrize("right", [0, 1, 4, 9])
@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_a_case_in_its_group_add_nothing_to_an_accuracys_interval(right, copies):
    once = np.array([1.0] * right + [0.0] * (9 - right))
    n = effective_sample_size(
        np.repeat(once, copies), np.repeat([f"g{i}" for i in range(9)], copies).tolist()
    )
    assert n == pytest.approx(9, abs=EXACT)
    assert wilson_interval(right / 9 * n, n) == pytest.approx(wilson_interval(right, 9), abs=EXACT)
    naive = wilson_interval(right * copies, 9 * copies)
    assert naive[1] - naive[0] < 0.9 * (wilson_interval(right, 9)[1] - wilson_interval(right, 9)[0])


def test_cases_without_groups_are_all_independent_of_each_other():
    for right in (0, 10, 30):
        assert effective_sample_size(
            np.array([1.0] * right + [0.0] * (30 - right)), [str(i) for i in range(30)]
        ) == pytest.approx(30, abs=EXACT)


def test_groups_that_say_nothing_about_their_cases_hardly_widen_an_interval():
    """1,000 fair coins in 200 groups of 5 have a design effect of 1.

    Its standard deviation is sqrt(2 (5 - 1) / 1000) = 9 %.
    """
    coins = np.random.default_rng(3).integers(0, 2, 1000).astype(float)
    assert 800 < effective_sample_size(coins, [str(i % 200) for i in range(1000)]) <= 1000


# ---- draws ----


def slow_bootstrap(categories, groups, statistic, draws=2000, seed=1):
    """Return the statistic of each sample; groups are drawn one after the other, in lists."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        drawn = []
        for category in dict.fromkeys(categories):
            inside = [i for i, c in enumerate(categories) if c == category]
            names = sorted({groups[i] for i in inside})
            for _ in names:
                name = names[rng.integers(len(names))]
                drawn += [i for i in inside if groups[i] == name]
        found.append(statistic(drawn))
    return np.array(found)


@pytest.mark.parametrize("what", ["mean", "macro", "of some"])
def test_an_interval_is_that_of_a_slow_bootstrap_of_whole_groups_within_categories(what):
    x, chosen = values(), list(range(0, CASES, 2))
    draws = ClusterBootstrap(CATEGORIES, GROUPS)
    if what == "mean":
        got = draws.mean(x)
        spread = slow_bootstrap(CATEGORIES, GROUPS, lambda drawn: x[drawn].mean())
    elif what == "of some":
        got = draws.mean(x, np.array(chosen))
        spread = slow_bootstrap(
            CATEGORIES, GROUPS, lambda drawn: x[[i for i in drawn if i in chosen]].mean()
        )
    else:
        got = draws.macro(x)
        spread = slow_bootstrap(
            CATEGORIES, GROUPS, lambda drawn: macro_mean(x[drawn], [CATEGORIES[i] for i in drawn])
        )
    # The 2.5 % quantile of 2,000 draws has a standard error of 0.06 standard deviations. Both are
    # drawn; 0.3 is more than three standard errors of their difference.
    assert got == pytest.approx(np.quantile(spread, [0.025, 0.975]), abs=0.3 * spread.std())


def test_every_draw_takes_whole_groups_and_as_many_of_each_category_as_there_are():
    for inside, times in ClusterBootstrap(CATEGORIES, GROUPS).draws:
        groups = np.array(GROUPS)[inside]
        names, first = np.unique(groups, return_index=True)
        assert len({CATEGORIES[i] for i in inside}) == 1
        assert (times[:, first].sum(1) == len(names)).all()
        for name in names:
            assert (np.ptp(times[:, groups == name], axis=1) == 0).all()
        assert times[:, first].mean() == pytest.approx(1, abs=EXACT)


def test_copies_of_a_case_in_its_group_leave_the_bootstrap_as_wide_as_it_was():
    x, names = values(n=20), [str(i) for i in range(20)]
    once = ClusterBootstrap(["c"] * 20, names).mean(x)
    threefold = ClusterBootstrap(["c"] * 60, names * 3).mean(np.tile(x, 3))
    assert threefold == pytest.approx(once, abs=EXACT)
    low, high = ClusterBootstrap(["c"] * 60, [str(i) for i in range(60)]).mean(np.tile(x, 3))
    assert (high - low) * math.sqrt(3) == pytest.approx(
        once[1] - once[0], rel=0.15
    )  # the naive one: by sqrt(3) too narrow


def test_the_same_cases_get_the_same_interval_every_time():
    first, second = (ClusterBootstrap(CATEGORIES, GROUPS).macro(values()) for _ in range(2))
    assert first == second
    shared = cluster_bootstrap(tuple(CATEGORIES), tuple(GROUPS))
    assert cluster_bootstrap(tuple(CATEGORIES), tuple(GROUPS)) is shared
    assert shared.mean(values()) == ClusterBootstrap(CATEGORIES, GROUPS).mean(values())


def test_a_draw_that_misses_all_chosen_cases_does_not_spoil_the_interval():
    """Of one case in 20 groups, a third of the draws have none."""
    draws = ClusterBootstrap(["c"] * 20, [str(i) for i in range(20)])
    assert draws.mean(np.full(20, 0.25), np.array([7])) == (0.25, 0.25)
    missing = values(n=20)
    missing[3:] = math.nan  # what is not chosen need not even be there
    low, high = draws.mean(missing, np.arange(3))
    assert missing[:3].min() <= low < high <= missing[:3].max()


def test_two_that_differ_in_few_cases_are_told_apart_by_pairs_and_not_by_their_own_intervals():
    """Of 200 cases, the second has 8 fewer right: a difference of 4 %.

    The paired interval has a half-width of 3 %, the unpaired one of 10 %.
    """
    first = np.array([1.0] * 100 + [0.0] * 100)
    second = first.copy()
    second[:8] = 0
    draws = ClusterBootstrap(["c"] * 200, [str(i) for i in range(200)])
    low, high = draws.macro(first - second)
    widths = [b - a for a, b in (draws.mean(first), draws.mean(second))]
    assert 0 < low < 0.04 < high
    assert high - low < math.hypot(*widths) / 3
    assert math.hypot(*widths) / 2 > 0.04  # so it includes zero


def test_the_mean_over_categories_does_not_care_how_many_cases_each_has():
    assert macro_mean(np.array([1.0, 1, 1, 0]), ["a", "a", "a", "b"]) == 0.5
    assert macro_mean(np.array([1.0, 0, 1, 0.5]), ["a", "b", "a", "b"]) == 0.625


# ---- tests ----


@pytest.mark.parametrize("wins, losses", [(0, 0), (1, 0), (3, 3), (6, 1), (2, 9), (0, 7)])
def test_mcnemars_p_is_the_share_of_all_ways_to_toss_that_are_as_uneven(wins, losses):
    first = np.array([1.0] * wins + [0.0] * losses + [1, 0, 0.5])
    second = np.array([0.0] * wins + [1.0] * losses + [1, 0, 0.5])  # equal ones say nothing
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=wins + losses)]
    uneven = sum(abs(2 * heads - wins - losses) >= abs(wins - losses) for heads in tosses) / len(
        tosses
    )
    assert mcnemar(first, second) == (wins, losses, pytest.approx(uneven, abs=EXACT))


def test_mcnemar_counts_a_shared_out_tie_as_less_than_a_win():
    assert mcnemar(np.array([1.0, 0.5, 0.5]), np.array([0.5, 0.0, 1.0]))[:2] == (2, 1)


def test_mcnemar_takes_tens_of_thousands_of_pairs():
    first = np.array([1.0] * 10_150 + [0.0] * 9_850)
    by_normal = math.erfc((300 - 1) / math.sqrt(2 * 20_000))  # with its correction for steps of one
    assert mcnemar(first, 1 - first) == (10_150, 9_850, pytest.approx(by_normal, rel=1e-3))


def test_the_rank_correlation_is_that_of_worked_examples():
    iq, hours = (
        [106, 100, 86, 101, 99, 103, 97, 113, 112, 110],
        [7, 27, 2, 50, 28, 29, 20, 12, 6, 17],
    )  # Wikipedia's example
    assert spearman(iq, hours) == pytest.approx(-29 / 165, abs=EXACT)
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(
        0.8207826816681233, abs=EXACT
    )  # with a tie; SciPy's example
    assert spearman([1, 10, 100], [math.log(x) for x in (1, 10, 100)]) == pytest.approx(
        1, abs=EXACT
    )
    assert spearman([1, 2, 3], [0.5, 0.5, 0.5]) is None


def test_the_draws_are_as_many_as_the_report_says():
    assert all(len(times) == DRAWS for _, times in ClusterBootstrap(CATEGORIES, GROUPS).draws)
