"""Where the best learning rate is, as far as a grid of rates with common seeds can tell.

Two answers, of which the first needs only that the loss has one valley over the rates. A bracket:
the nearest rates on both sides of the best one that are shown to be worse than it. And, if five or
more rates near the best one fit a parabola over log(rate), an interval around its lowest point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from storylab.experiments.statistics import ALPHA, mean_interval

LEAST_RATES = 5
# The fit uses rates within this factor of the best one: far enough to show that the valley is no
# parabola where it is none.
FIT_FACTOR = 10.0
# A fit with a smaller p-value of its lack of fit is refused. With a usual level of 0.05 a slightly
# skewed valley passes too often, and its interval misses the optimum.
FIT_LEVEL = 0.25
# Polynomials whose intervals are joined; those of higher degree allow for a skew that the test of
# the parabola does not see.
DEGREES = (2, 3, 4)
GRID = 401


@dataclass(frozen=True)
class Bracket:
    """The rates between which the optimum is, if the loss has one valley over the rates."""

    best: float
    """The rate with the lowest mean loss."""
    low: float | None
    """The next rate below that is shown to be worse, or None: the optimum may be below the grid."""
    high: float | None
    """The next rate above that is shown to be worse or diverged, or None."""
    level: tuple[float, ...]
    """Rates inside the bracket, other than the best, that are not resolved from it."""


@dataclass(frozen=True)
class FittedOptimum:
    """The lowest point of a parabola over log(rate), with its 95 % interval."""

    rate: float
    low: float
    high: float


def bracket(rates: Sequence[float], losses: np.ndarray) -> Bracket:
    """The nearest rates on both sides of the best one that are worse, paired by seed.

    Args:
        rates: one for each column.
        losses: ``[seeds, rates]`` in nats, infinite for a run that diverged; at least one rate
            trained in every seed.

    Each rate is tested against the best one on its side of 5 % divided by the number of tests, so a
    wrong end of the bracket has a chance of at most 5 %. With one seed nothing is resolved.
    """
    order = np.argsort(rates, kind="stable")
    x, y = np.asarray(rates, float)[order], np.asarray(losses, float)[:, order]
    means = y.mean(axis=0)
    best = int(np.argmin(means))
    tests = max(int(np.isfinite(means).sum()) - 1, 1)
    level: list[float] = []

    def end(indices: range) -> float | None:
        for index in indices:
            if x[index] == x[best]:
                continue
            if not np.isfinite(means[index]) or _is_worse(y[:, index] - y[:, best], tests):
                return float(x[index])
            level.append(float(x[index]))
        return None

    low, high = end(range(best - 1, -1, -1)), end(range(best + 1, len(x)))
    return Bracket(float(x[best]), low, high, tuple(sorted(level)))


def _is_worse(differences: np.ndarray, tests: int) -> bool:
    interval = mean_interval(list(differences))
    return interval is not None and interval.estimate > 0 and interval.p / 2 < ALPHA / tests


def fit_optimum(rates: Sequence[float], losses: np.ndarray) -> FittedOptimum | str:
    """The lowest point of a parabola over log(rate), or the reason why none is given.

    Args:
        rates: one for each column.
        losses: ``[seeds, rates]`` in nats, infinite for a run that diverged.

    The interval holds the points at which the slope is not shown to be other than zero (the method
    of Fieller 1954, Journal of the Royal Statistical Society B 16, 175-185, with the seeds' own
    fits as the sample), for the parabola and for polynomials of the next degrees. What it promises
    is tested by simulation on valleys that are no parabolas.
    """
    finite = np.isfinite(losses).all(axis=0)
    x = np.log(np.asarray(rates, float)[finite])
    y = np.asarray(losses, float)[:, finite]
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[:, order]
    best = int(np.argmin(y.mean(axis=0))) if len(x) else 0
    near = np.abs(x - x[best]) <= math.log(FIT_FACTOR) + 1e-9 if len(x) else finite[:0]
    x, y = x[near], y[:, near]
    if len(set(x)) < LEAST_RATES:
        return (
            f"an optimum between the peaks needs {LEAST_RATES} or more that trained within a "
            f"factor of {FIT_FACTOR:g} of the best, here {len(set(x))}"
        )
    if len(y) < 2:
        return "an optimum between the peaks needs two or more seeds"
    p = _lack_of_fit(x, y)
    if p < FIT_LEVEL:
        return f"a parabola over log(rate) does not fit (lack of fit: p {p:.2g})"
    intervals = [_flat_part(x, y, degree) for degree in DEGREES]
    known = [interval for interval in intervals if interval]
    if len(known) < len(intervals):
        return "the seeds do not show where between the peaks the slope changes its sign"
    a, b, _ = np.polyfit(x - x[0], y.mean(axis=0), 2)
    low, high = min(i[0] for i in known), max(i[1] for i in known)
    return FittedOptimum(*(math.exp(v) for v in (x[0] - b / (2 * a), low, high)))


def _lack_of_fit(x: np.ndarray, y: np.ndarray) -> float:
    """p-value of the F test of a parabola against free means, each seed a block."""
    seeds, count = y.shape
    means = y.mean(axis=0)
    columns = np.vander(x - x.mean(), 3)
    fitted = columns @ np.linalg.lstsq(columns, means, rcond=None)[0]
    residuals = y - y.mean(axis=1, keepdims=True) - means + means.mean()
    noise = (residuals**2).sum() / ((count - 1) * (seeds - 1))
    misfit = seeds * ((means - fitted) ** 2).sum() / (count - 3)
    if noise == 0:
        return 0.0
    return float(stats.f.sf(misfit / noise, count - 3, (count - 1) * (seeds - 1)))


def _flat_part(x: np.ndarray, y: np.ndarray, degree: int) -> tuple[float, float] | None:
    """The part of the range where the slope of a polynomial may be zero, over the seeds;
    None unless it falls before that part and rises after it."""
    middle = x.mean()
    grid = np.linspace(x[0], x[-1], GRID)
    columns = np.vander(x - middle, degree + 1, increasing=True)
    fits = np.linalg.lstsq(columns, y.T, rcond=None)[0]
    powers = np.arange(1, degree + 1)
    slopes = (powers * (grid - middle)[:, None] ** (powers - 1)) @ fits[1:]
    seeds = len(y)
    reach = stats.t.ppf(1 - ALPHA / 2, seeds - 1) * slopes.std(axis=1, ddof=1) / math.sqrt(seeds)
    falls, rises = slopes.mean(axis=1) < -reach, slopes.mean(axis=1) > reach
    # The first point that is not shown to fall, and the last that is not shown to rise.
    first = int(np.argmin(falls))
    last = GRID - 1 - int(np.argmin(rises[::-1]))
    if first == 0 or last == GRID - 1 or falls[first:].any() or rises[: last + 1].any():
        return None
    # One point of the grid further on both sides, as the true ends lie between two points.
    return float(grid[first - 1]), float(grid[last + 1])
