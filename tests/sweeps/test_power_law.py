"""Fits of power laws beside exact ones, and intervals beside those of a linear regression."""

import math

import numpy as np
import pytest
from scipy import stats

from pocketlm.errors import UserError
from pocketlm.sweeps.power_law import bootstrap, fit, forecast

COMPUTE = [1e9, 4e9, 1.6e10, 6.4e10, 2.56e11]


@pytest.mark.parametrize("floor", [0.4, 1.1])
def test_an_exact_law_with_a_floor_is_recovered_and_chosen(floor):
    loss = [floor + 1.5 * (c / 1e10) ** -0.3 for c in COMPUTE]
    found = forecast(COMPUTE, loss, 1e12)
    assert found.law.has_floor
    assert found.law.floor == pytest.approx(floor, rel=1e-3)
    assert found.law.exponent == pytest.approx(0.3, rel=1e-3)
    assert found.loss == pytest.approx(floor + 1.5 * 100**-0.3, rel=1e-4)
    assert abs(found.errors["line"]) > 0.01 > abs(found.errors["with E"])


def test_a_line_in_log_log_axes_is_what_a_linear_regression_gives():
    loss = [4.0, 3.1, 2.5, 1.9, 1.5]
    line = stats.linregress(np.log(COMPUTE), np.log(loss))
    law = fit(COMPUTE, loss, has_floor=False)
    assert law.exponent == pytest.approx(-line.slope)
    assert math.log(law.loss(1e12)) == pytest.approx(line.intercept + line.slope * math.log(1e12))


def test_the_bootstrap_interval_of_a_line_is_that_of_students_t():
    """Of the exponent, and of a new run (a prediction interval).

    Of 20,000 draws with 3 degrees of freedom, the 2.5 % quantiles have a standard error of 3 %.
    """
    loss = [4.0, 3.1, 2.5, 1.9, 1.5]
    x = np.log(COMPUTE)
    line = stats.linregress(x, np.log(loss))
    law = fit(COMPUTE, loss, has_floor=False)
    exponents, losses = bootstrap(law, COMPUTE, 1e12, draws=20_000)
    t = stats.t.ppf(0.975, 3)
    half = (np.quantile(exponents, 0.975) - np.quantile(exponents, 0.025)) / 2
    assert half == pytest.approx(t * line.stderr, rel=0.12)
    distance = (math.log(1e12) - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    error = t * law.residual * math.sqrt(1 + 1 / 5 + distance)
    half = np.log(np.quantile(losses, 0.975) / np.quantile(losses, 0.025)) / 2
    assert half == pytest.approx(error, rel=0.12)


def test_too_few_sizes_and_losses_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="3 sizes have been trained"):
        forecast(COMPUTE[:3], [3.0, 2.0, 1.0], 1e12)
    with pytest.raises(UserError, match="not a positive number"):
        forecast(COMPUTE, [3.0, 2.0, 1.0, math.nan, 0.5], 1e12)
