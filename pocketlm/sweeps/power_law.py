"""The loss of a model as a power law of the compute that trained it.

    loss = E + A * (compute / reference) ** -alpha

E is the loss that no compute removes. With E = 0 it is a line in log-log axes. Five sizes hardly
determine E, so both forms are fitted, and the one that predicted the largest of the sizes better
from the smaller ones is used. The errors of log(loss) are taken as normal and alike (Hoffmann et
al. 2022, arXiv:2203.15556, fit the logarithm too).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares  # type: ignore[import-untyped]  # has no types

from pocketlm.errors import UserError
from pocketlm.evaluation.statistics import SEED, Interval, percentile_interval

Floats = NDArray[np.float64]
MIN_SIZES = 4  # the line has two coefficients; the residuals of one size more say nothing
STARTS = (0.01, 0.5, 0.9)  # E as a share of the loss; a fit from one start may stay at E = 0
MAX_LOG, TINY = 50.0, 1e-9  # bounds that keep exp and log finite
BOOTSTRAP_DRAWS = 500

Coefficients = tuple[float, float, float]  # E, A and alpha


@dataclass(frozen=True)
class PowerLaw:
    """A fit of one of the two forms."""

    floor: float  # E, in nats per token; 0 for the line
    scale: float  # A, the rest of the loss at the reference
    exponent: float  # alpha
    reference: float  # compute, in the unit of the sizes that were fitted
    residual: float  # standard deviation of log(loss), by the degrees of freedom
    has_floor: bool

    @property
    def coefficients(self) -> int:
        return 3 if self.has_floor else 2

    def loss(self, compute: Floats | float) -> Floats:
        """Return the loss that the law gives for an amount of compute."""
        ratio = np.asarray(compute, dtype=np.float64) / self.reference
        law: Floats = self.floor + self.scale * ratio**-self.exponent
        return law

    @property
    def text(self) -> str:
        """The law as a formula."""
        floor = f"{self.floor:.3f} + " if self.has_floor else ""
        return (
            f"loss = {floor}{self.scale:.3f} * (C / {self.reference:.3g}) ** -{self.exponent:.3f}"
        )


def fit(
    compute: Sequence[float],
    loss: Sequence[float],
    has_floor: bool,
    near: PowerLaw | None = None,
) -> PowerLaw:
    """Return the fit by least squares of log(loss); the reference is the geometric mean.

    near: a law close to the one looked for, from which the fit with E starts.

    >>> law = fit([1.0, 4.0, 16.0, 64.0], [4.0, 2.0, 1.0, 0.5], has_floor=False)
    >>> round(law.exponent, 6), round(law.scale, 6), round(law.reference, 6)
    (0.5, 1.414214, 8.0)
    """
    x, y = np.log(np.asarray(compute)), np.log(np.asarray(loss))
    reference = float(np.exp(x.mean()))
    slope, intercept = np.polyfit(x - x.mean(), y, 1)
    floor, scale, exponent = 0.0, float(np.exp(intercept)), -float(slope)
    if has_floor:
        starts = [(near.floor, near.scale, near.exponent)] if near else []
        for share in () if near else STARTS:
            starts.append((share * scale, (1 - share) * scale, exponent / (1 - share)))
        floor, scale, exponent = fit_with_floor(x - x.mean(), y, starts)
    law = PowerLaw(floor, scale, exponent, reference, 0.0, has_floor)
    errors = y - np.log(law.loss(np.asarray(compute)))
    freedom = max(1, len(y) - law.coefficients)
    return replace(law, residual=math.sqrt(float(errors @ errors) / freedom))


def fit_with_floor(x: Floats, y: Floats, starts: Sequence[Coefficients]) -> Coefficients:
    """Return the best E, A and alpha from any of the starts; x and y are logarithms.

    Logarithms of E and A are fitted, which keeps both positive.
    """

    def errors(coefficients: Floats) -> Floats:
        floor, scale, exponent = coefficients
        terms = np.clip([floor + 0 * x, scale - exponent * x], -MAX_LOG, MAX_LOG)
        error: Floats = np.logaddexp(*terms) - y
        return error

    fits = [
        least_squares(errors, (math.log(max(floor, TINY)), math.log(max(scale, TINY)), exponent))
        for floor, scale, exponent in starts
    ]
    floor, scale, exponent = min(fits, key=lambda fitted: float(fitted.cost)).x
    return math.exp(floor), math.exp(scale), float(exponent)


@dataclass(frozen=True)
class Forecast:
    """The law chosen, its intervals, and the loss that it predicts for another compute."""

    law: PowerLaw
    errors: dict[str, float]  # of each form, in nats: the largest size predicted from the others
    exponent: Interval
    loss: float
    interval: Interval  # for a new run: of the law and of the run's own error


def forecast(compute: Sequence[float], loss: Sequence[float], target: float) -> Forecast:
    """Choose a form, and predict the loss at the compute `target`. Raises UserError.

    compute: ascending. Intervals are of 95 %, by a parametric bootstrap: each draw has its own
    variance, from its chi-squared distribution, as Student's t has.
    """
    check_sizes(compute, loss)
    errors = {}
    for name, has_floor in (("line", False), ("with E", True)):
        smaller = fit(compute[:-1], loss[:-1], has_floor)
        errors[name] = float(smaller.loss(compute[-1])) - loss[-1]
    law = fit(compute, loss, abs(errors["with E"]) < abs(errors["line"]))
    exponents, losses = bootstrap(law, compute, target)
    return Forecast(
        law,
        errors,
        percentile_interval(exponents),
        float(law.loss(target)),
        percentile_interval(losses),
    )


def bootstrap(
    law: PowerLaw, compute: Sequence[float], target: float, draws: int = BOOTSTRAP_DRAWS
) -> tuple[Floats, Floats]:
    """Return the exponents (draws,) and the losses of a new run at the target (draws,)."""
    rng = np.random.default_rng(SEED)
    means = np.log(law.loss(np.asarray(compute)))
    freedom = max(1, len(compute) - law.coefficients)
    exponents, losses = np.empty(draws), np.empty(draws)
    for i in range(draws):
        deviation = law.residual * math.sqrt(freedom / rng.chisquare(freedom))
        drawn = fit(compute, np.exp(rng.normal(means, deviation)).tolist(), law.has_floor, law)
        exponents[i] = drawn.exponent
        losses[i] = drawn.loss(target) * math.exp(rng.normal(0, deviation))
    return exponents, losses


def check_sizes(compute: Sequence[float], loss: Sequence[float]) -> None:
    """Raise UserError if a law cannot be fitted to the sizes."""
    if len(compute) < MIN_SIZES:
        raise UserError(
            f"{len(compute)} sizes have been trained; a law and its intervals need {MIN_SIZES}"
        )
    if any(value <= 0 or not math.isfinite(value) for value in loss):
        raise UserError("a loss is not a positive number, so that no law can be fitted")
