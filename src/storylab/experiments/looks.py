"""Levels of planned looks: how small a p-value must be at each, so that looking costs no error.

The shape is O'Brien and Fleming's (1979, doi 10.2307/2530245) over the shares of the seeds, so that early
looks are strict and the last one is nearly as sensitive as a single look. For the smaller level of one
among several hypotheses the shape is scaled until the chance to cross it at any look is that level
(the group-sequential Bonferroni of Maurer and Bretz 2013, doi 10.1080/19466315.2013.807748).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import optimize, stats

DEFAULT_LOOKS = (3, 5, 8)
NODES = 129


@cache
def look_levels(looks: tuple[int, ...], alpha: float = 0.05, family: float = 0.05) -> list[float]:
    """Two-sided levels of the looks at which one hypothesis is tested.

    Args:
        looks: numbers of seeds at the planned looks, increasing.
        alpha: chance to cross a level at any look if there is no difference.
        family: the level at which the shape is O'Brien and Fleming's: that of all hypotheses together.
    """
    if len(looks) == 1:
        return [alpha]
    shape = [2 * stats.norm.sf(z) for z in _boundary(looks, family)]
    if alpha == family:
        return [float(level) for level in shape]
    scale = optimize.brentq(
        lambda c: crossing(looks, [c * level for level in shape]) - alpha,
        alpha / family / len(looks),
        min(alpha / family * len(looks), 1 / max(shape) * 0.999),
    )
    return [float(scale * level) for level in shape]


def crossing(looks: Sequence[int], levels: Sequence[float]) -> float:
    """Chance that a standardized sum of independent normal values crosses the two-sided ``levels`` at any
    of the ``looks`` (Armitage, McPherson and Rowe 1969, doi 10.2307/2343787)."""
    return _crossing(looks, [float(stats.norm.isf(level / 2)) for level in levels])


def _crossing(looks: Sequence[int], values: Sequence[float]) -> float:
    """The same of critical values."""
    shares = np.asarray(looks, float) / looks[-1]
    # Nothing is further from zero than 38 standard deviations, in double precision.
    ends = [min(z, 38.0) * math.sqrt(t) for z, t in zip(values, shares, strict=True)]
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    # The density of the sum among the paths that have not crossed, at the nodes of each look.
    points = nodes * ends[0]
    density = stats.norm.pdf(points, scale=math.sqrt(shares[0])) * weights * ends[0]
    for before, share, end in zip(shares[:-1], shares[1:], ends[1:], strict=True):
        steps = nodes[:, None] * end - points[None, :]
        density = stats.norm.pdf(steps, scale=math.sqrt(share - before)) @ density
        points, density = nodes * end, density * weights * end
    return float(1 - density.sum())


def _boundary(looks: tuple[int, ...], alpha: float) -> list[float]:
    """O'Brien and Fleming's critical values: a constant over the root of each look's share."""

    def values(constant: float) -> list[float]:
        return [constant / math.sqrt(n / looks[-1]) for n in looks]

    return values(float(optimize.brentq(lambda c: _crossing(looks, values(c)) - alpha, 0.5, 10.0)))
