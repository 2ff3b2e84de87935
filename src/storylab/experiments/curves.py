"""Power laws fitted to loss curves, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

# A doubling that brings less than this counts as a plateau, in nats.
PLATEAU_GAIN = 0.01
LEAST_POINTS = 6
# A plateau further away than this many times the run is not predicted.
HORIZON = 20
# Shares of a curve's points that the fits leave out at its start, as many fits as shares.
STARTS = (0.0, 1 / 6, 1 / 3, 1 / 2)


@dataclass(frozen=True)
class PowerLaw:
    """loss(i) = floor + scale * i ** -exponent, over the number of iterations trained
    (Kaplan et al. 2020, arXiv 2001.08361, with the floor of Henighan et al. 2020, arXiv 2010.14701)."""

    floor: float
    scale: float
    exponent: float

    def __call__(self, iteration: float) -> float:
        """Loss in nats after ``iteration`` iterations."""
        return self.floor + self.scale * float(iteration) ** -self.exponent

    def doubling_gain(self, iteration: float) -> float:
        """By how many nats twice the training would lower the loss, as the curve goes on."""
        return self(iteration) - self(2 * iteration)

    @property
    def plateau(self) -> float:
        """Iteration from which a doubling brings less than ``PLATEAU_GAIN``; infinite if none does."""
        step = self.scale * (1 - 2**-self.exponent)
        if step <= 0 or self.exponent <= 0:
            return math.inf
        return float((step / PLATEAU_GAIN) ** (1 / self.exponent))


def fit_power_law(iterations: Sequence[int], losses: Sequence[float]) -> PowerLaw | None:
    """The power law through a curve by least squares; None if there are too few points."""
    if len(iterations) < LEAST_POINTS:
        return None
    x, y = np.asarray(iterations, float), np.asarray(losses, float)
    # Given the exponent the rest is linear: one dimension is searched, which finds the best one.

    def solve(exponent: float) -> tuple[float, np.ndarray]:
        columns = np.stack((np.ones_like(x), x**-exponent), axis=1)
        coefficients, *_ = np.linalg.lstsq(columns, y, rcond=None)
        # A floor below zero is no loss: then the line through the origin is the best that is left.
        if coefficients[0] < 0:
            slope = float(columns[:, 1] @ y / (columns[:, 1] @ columns[:, 1]))
            coefficients = np.array([0.0, slope])
        return float(((columns @ coefficients - y) ** 2).sum()), coefficients

    grid = np.linspace(0.02, 3.0, 150)
    start = grid[int(np.argmin([solve(e)[0] for e in grid]))]
    found = optimize.minimize_scalar(
        lambda e: solve(e)[0], bounds=(max(start - 0.03, 0.01), start + 0.03), method="bounded"
    )
    exponent = float(found.x)
    floor, scale = (float(c) for c in solve(exponent)[1])
    if not scale > 0:
        return None
    return PowerLaw(floor, scale, exponent)


@dataclass(frozen=True)
class Extrapolation:
    """The future of one run's curve by power laws, and how such a law did on its past."""

    end: int
    """The last iteration of the curve."""
    begun: tuple[int, ...]
    """The first iteration that each fit used."""
    laws: tuple[PowerLaw | None, ...]
    """The fit from each of those iterations to the end; None where no law fits."""
    predicted_gain: float | None
    """Nats by which a law fitted to the first half lowers the loss in the second half."""
    measured_gain: float | None
    """Nats by which the loss fell in the second half."""

    @property
    def doubling_gains(self) -> tuple[float, ...] | None:
        """Nats that a doubling is predicted to bring, from each start; None if one has no law."""
        known = [law for law in self.laws if law]
        if len(known) < len(self.laws):
            return None
        return tuple(law.doubling_gain(self.end) for law in known)

    @property
    def plateaus(self) -> tuple[float, ...] | None:
        """Iterations at which the plateau is predicted, from each start; None if a start has no
        law, or puts the plateau beyond ``HORIZON`` times the run."""
        found = [law.plateau if law else math.inf for law in self.laws]
        return tuple(found) if max(found) <= HORIZON * self.end else None


def extrapolate(iterations: Sequence[int], losses: Sequence[float]) -> Extrapolation | None:
    """Fit power laws to a curve from several starts, and to its first half as a check.

    An interval over seeds does not show whether the law holds. The spread over starts does, and so does
    the error on the second half, which the fit of the first half has not seen.

    Args:
        iterations: the iterations of the evaluations after the warm-up, rising.
        losses: validation losses in nats.

    Returns:
        None if there are too few points.
    """
    points = len(iterations)
    if points < LEAST_POINTS:
        return None
    firsts = sorted({min(int(points * share), points - LEAST_POINTS) for share in STARTS})
    end = iterations[-1]
    half = sum(iteration <= end / 2 for iteration in iterations)
    law = fit_power_law(iterations[:half], losses[:half])
    predicted = measured = None
    if law is not None:
        predicted = law(iterations[half - 1]) - law(end)
        measured = losses[half - 1] - losses[-1]
    return Extrapolation(
        end=end,
        begun=tuple(iterations[first] for first in firsts),
        laws=tuple(fit_power_law(iterations[first:], losses[first:]) for first in firsts),
        predicted_gain=predicted,
        measured_gain=measured,
    )
