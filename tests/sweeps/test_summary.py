"""Means, intervals and the winner of a sweep, beside scipy."""

import numpy as np
import pytest
from scipy import stats

from pocketlm.sweeps.runs import Losses
from pocketlm.sweeps.space import Axis
from pocketlm.sweeps.study import Record
from pocketlm.sweeps.summary import Summary, edges, mean_and_error, paired_interval, verdict

LOSSES = {1: [2.01, 2.05, 2.03, 2.07], 2: [1.90, 1.97, 1.93, 1.99], 3: [1.91, 1.95, 1.95, 1.98]}


def summary(number: int, values: list[float], problem: str = "") -> Summary:
    records = tuple(
        Record(number, seed, 1.0, Losses(9, loss, loss, loss, loss), problem, not problem)
        for seed, loss in enumerate(values)
    )
    return Summary(number, {"training.lr": str(number)}, records, "best_loss")


def test_the_standard_error_is_scipys():
    mean, error = mean_and_error(LOSSES[1])
    assert (mean, error) == (pytest.approx(np.mean(LOSSES[1])), pytest.approx(stats.sem(LOSSES[1])))
    assert mean_and_error([2.0]) == (2.0, None)


def test_the_paired_interval_is_scipys():
    differences = [a - b for a, b in zip(LOSSES[2], LOSSES[1], strict=True)]
    expected = stats.ttest_rel(LOSSES[2], LOSSES[1]).confidence_interval(0.95)
    assert paired_interval(differences) == pytest.approx((expected.low, expected.high))


def test_a_winner_is_below_every_other_by_its_paired_interval():
    one, two, three = (summary(number, values) for number, values in LOSSES.items())
    assert verdict([two, one]).startswith("winner: training.lr=2")
    text = verdict([two, three, one])
    assert "No winner" in text and "training.lr=3 [" in text and "training.lr=1" not in text


def test_the_interval_is_of_common_seeds_only():
    """Without the fourth seed, the differences are -0.11, -0.08 and -0.10."""
    one, two = summary(1, LOSSES[1][:3]), summary(2, LOSSES[2])
    assert "[-0.1346, -0.0587]" in verdict([two, one])


def test_a_best_value_at_the_edge_is_pointed_out_unless_the_values_beyond_failed():
    rows = [summary(number, values) for number, values in LOSSES.items()]
    axis = Axis("training.lr", ("1", "2", "3"))
    assert edges([axis], [rows[1], rows[2], rows[0]]) == []
    [hint] = edges([axis], [rows[2], rows[1], rows[0]])
    assert hint.startswith("training.lr=3 is the largest value tried")
    beyond = summary(4, [1.0], problem="the training loss is not finite")
    assert edges([axis], [rows[2], rows[1], rows[0], beyond]) == []


def test_a_configuration_that_failed_cannot_win_and_one_seed_has_no_interval():
    failed = summary(1, [1.0, 1.0], problem="the training loss is not finite")
    two = summary(2, LOSSES[2])
    assert verdict([failed, two]) == (
        "best: training.lr=2, the only configuration that was trained to the end; not compared, as "
        "a run failed: training.lr=1"
    )
    assert verdict([failed]).startswith("no winner")
    assert "add --seeds 3" in verdict([summary(2, [1.0]), summary(3, [2.0])])
