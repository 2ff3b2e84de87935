"""The noise of an arm's paired differences: from its own seeds, or helped by the other arms.

With three seeds an arm's own variance has two degrees of freedom, and a test needs enormous differences.
Arms of one experiment share their model, data and length, and mostly their noise: the moderated variance
of Smyth (2004, doi 10.2202/1544-6115.1027) borrows from them as far as their variances agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from storylab.experiments.experiment import Variance
from storylab.experiments.statistics import Interval, mean_interval

# Few arms estimate poorly how far their variances agree: more borrowed degrees of freedom than this would
# trust that estimate too far (docs/statistics.md has the error for arms of unlike noise).
MOST_BORROWED = 4.0
FEWEST_ARMS = 3
# Variances below this share of the median are taken as that: the logarithm of a chance zero is no measure.
LEAST_SHARE = 1e-5
# Below this p-value of Bartlett's test, arms are not alike enough for one pooled variance.
UNLIKE = 0.1


@dataclass(frozen=True)
class Prior:
    """The variance that the arms together suggest, worth ``df`` degrees of freedom."""

    variance: float
    df: float


def prior_of(variances: Sequence[float], dfs: Sequence[float]) -> Prior | None:
    """The prior of an arm's variance by Smyth's moments of log variances, its df at most 4.

    Args:
        variances: of each arm's paired differences.
        dfs: degrees of freedom of each, its pairs minus 1.

    Returns:
        None for fewer than three arms, or if all differences are equal to the bit.
    """
    s2, f = np.asarray(variances, float), np.asarray(dfs, float)
    if len(s2) < FEWEST_ARMS or not np.median(s2) > 0:
        return None
    s2 = np.maximum(s2, LEAST_SHARE * np.median(s2))
    logs = np.log(s2) - special.digamma(f / 2) + np.log(f / 2)
    excess = float(logs.var(ddof=1) - special.polygamma(1, f / 2).mean())
    df = MOST_BORROWED
    if excess > special.polygamma(1, df / 2):
        df = 2 * float(
            optimize.brentq(lambda y: special.polygamma(1, y) - excess, 1e-6, MOST_BORROWED / 2)
        )
    variance = math.exp(float(logs.mean()) + float(special.digamma(df / 2)) - math.log(df / 2))
    return Prior(variance, df)


def moderated_intervals(
    differences: Sequence[Sequence[float]],
) -> tuple[list[Interval | None], Variance]:
    """Every arm's difference with its moderated error, None for fewer than two pairs; and ``own`` instead
    of ``moderated`` where nothing could be borrowed.

    Args:
        differences: of each arm, arm minus baseline by seed; their numbers may differ.
    """
    own = [mean_interval(values) for values in differences]
    known = [interval for interval in own if interval]
    prior = prior_of([i.standard_error**2 * i.n for i in known], [i.df for i in known])
    if prior is None:
        return own, "own"
    total = sum(i.df for i in known)
    return [_moderated(i, prior, total) if i else None for i in own], "moderated"


def _moderated(own: Interval, prior: Prior, total: float) -> Interval:
    df = prior.df + own.df
    variance = (prior.df * prior.variance + own.df * own.standard_error**2 * own.n) / df
    return Interval(own.estimate, math.sqrt(variance / own.n), min(df, total), own.n)


def pooled_contrasts(contrasts: Sequence[Sequence[float]]) -> list[Interval | None] | None:
    """Every contrast with one error for all: their mean variance. Contrasts of a factorial design are
    independent, unlike differences to a shared baseline.

    Args:
        contrasts: of each effect by seed, scaled to equal variance.

    Returns:
        None as :func:`pooled_intervals`.
    """
    effects, n = len(contrasts), len(contrasts[0])
    if not _can_be_pooled(contrasts):
        return None
    variance = float(np.var(np.asarray(contrasts, float), axis=1, ddof=1).mean())
    error, df = math.sqrt(variance / n), effects * (n - 1)
    return [Interval(float(np.mean(values)), error, df, n) for values in contrasts]


def _can_be_pooled(differences: Sequence[Sequence[float]]) -> bool:
    """Whether all have equal numbers of seeds, and noise that Bartlett's test does not find unlike."""
    n = len(differences[0])
    if n < 2 or any(len(values) != n for values in differences):
        return False
    table = np.asarray(differences, float)
    known = len(differences) > 1 and (table.var(axis=1) > 0).all()
    return not (known and stats.bartlett(*table).pvalue < UNLIKE)


def pooled_intervals(differences: Sequence[Sequence[float]]) -> list[Interval | None] | None:
    """Every arm's difference with one error for all: the residual of an analysis of variance with seeds
    as blocks, baseline included.

    Returns:
        None if arms have other numbers of seeds, or Bartlett's test finds their noise unlike.
    """
    arms, n = len(differences), len(differences[0])
    if not _can_be_pooled(differences):
        return None
    table = np.asarray(differences, float)
    # The baseline's own differences are zero; what seeds share drops out as the blocks' effect.
    table = np.vstack((np.zeros(n), table))
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    df = arms * (n - 1)
    error = math.sqrt(2 * float((rest**2).sum()) / df / n)
    return [Interval(float(np.mean(values)), error, df, n) for values in differences]


def intervals(
    differences: Sequence[Sequence[float]], variance: Variance, shared_baseline: bool = True
) -> tuple[list[Interval | None], Variance]:
    """Every arm's difference with its error, and the way in which the error was estimated: arms that are
    too unlike to be pooled are moderated.

    Args:
        differences: of each arm by seed.
        variance: how to estimate their noise.
        shared_baseline: whether all are differences to one baseline; else they are independent.
    """
    if len(differences) == 0:
        return [], variance
    if variance == "own":
        return [mean_interval(values) for values in differences], "own"
    pooled = pooled_intervals if shared_baseline else pooled_contrasts
    if variance == "pooled" and (found := pooled(differences)) is not None:
        return found, "pooled"
    return moderated_intervals(differences)
