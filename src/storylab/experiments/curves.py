"""Formulas for loss curves: power laws over a run, and the best learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

# A doubling that brings less than this counts as a plateau, in nats.
PLATEAU_GAIN = 0.01
LEAST_POINTS = 6


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
        """Iteration from which a doubling brings less than 0.01 nats; infinite if none does."""
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


def parabola_minimum(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The learning rate at the lowest point of a parabola over log(rate) through the best of
    ``losses`` and its two neighbours; None if the best is at an end of the grid."""
    order = np.argsort(rates)
    x, y = np.log(np.asarray(rates, float)[order]), np.asarray(losses, float)[order]
    best = int(np.argmin(y))
    if not 0 < best < len(x) - 1 or not np.isfinite(y[best - 1 : best + 2]).all():
        return None
    a, b, _ = np.polyfit(x[best - 1 : best + 2], y[best - 1 : best + 2], 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else None


def pareto_front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats in both cost and loss, cheapest first."""
    front: list[int] = []
    lowest = math.inf
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if losses[index] < lowest:
            front.append(index)
            lowest = losses[index]
    return front
