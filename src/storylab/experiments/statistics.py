"""Intervals, tests and power for differences between runs; scipy does the distributions.

Differences are loss of the arm minus loss of the baseline, in nats, so that below zero is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
ALPHA = 1 - LEVEL
POWER = 0.8
MOST_SEEDS = 1000
QUANTILES = 4000


@dataclass(frozen=True)
class Interval:
    """A difference with its standard error; intervals and tests are Student's with ``df``."""

    estimate: float
    standard_error: float
    df: float
    n: int

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.estimate - self._reach()

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.estimate + self._reach()

    @property
    def p(self) -> float:
        """Two-sided p-value of "no difference"."""
        if self.standard_error == 0:
            return 1.0 if self.estimate == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.estimate) / self.standard_error, self.df))

    def equivalence_p(self, margin: float) -> float:
        """p-value of "differs by ``margin`` or more": the larger of two one-sided tests
        (Schuirmann 1987, doi 10.1007/BF01068419)."""
        if self.standard_error == 0:
            return 0.0 if abs(self.estimate) < margin else 1.0
        nearest = margin - abs(self.estimate)
        return float(stats.t.sf(nearest / self.standard_error, self.df))

    def _reach(self) -> float:
        return float(stats.t.ppf(1 - ALPHA / 2, self.df)) * self.standard_error


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of a mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(float(np.mean(values)), error, n - 1, n)


def unpaired_interval(arm: Sequence[float], baseline: Sequence[float]) -> Interval | None:
    """Welch's interval of the difference of two means; None if either has fewer than two values."""
    n, m = len(arm), len(baseline)
    if min(n, m) < 2:
        return None
    a, b = float(np.var(arm, ddof=1)) / n, float(np.var(baseline, ddof=1)) / m
    estimate = float(np.mean(arm) - np.mean(baseline))
    if a + b == 0:
        return Interval(estimate, 0.0, n + m - 2, min(n, m))
    df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
    return Interval(estimate, math.sqrt(a + b), df, min(n, m))


def noise_interval(difference: float, noise: float, noise_df: int) -> Interval:
    """Interval of a single pair's difference, from the spread of the baseline over other seeds.

    Args:
        difference: loss of the one run minus loss of the other.
        noise: standard deviation of the loss over seeds of one recipe.
        noise_df: degrees of freedom of ``noise``, the number of its seeds minus 1.
    """
    # The two losses as if independent: shared weights and order can only make the spread less.
    return Interval(difference, math.sqrt(2) * noise, noise_df, 1)


def story_interval(
    arm_losses: np.ndarray, baseline_losses: np.ndarray, tokens: np.ndarray
) -> Interval | None:
    """Difference in nats per token between two models over stories like these, paired by story.

    Args:
        arm_losses: sums of nats ``[n]`` of each story.
        baseline_losses: the same of the other model.
        tokens: predicted tokens ``[n]`` of each story.

    The error is that of a ratio of sums (Cochran 1977, Sampling Techniques, section 6.4) over the
    stories' differences; None for fewer than two stories.
    """
    n = len(tokens)
    if n < 2:
        return None
    differences = arm_losses - baseline_losses
    estimate = float(differences.sum() / tokens.sum())
    residuals = differences - estimate * tokens
    error = math.sqrt(n / (n - 1) * float((residuals**2).sum())) / float(tokens.sum())
    return Interval(estimate, error, n - 1, n)


def deviation_interval(deviation: float, n: int) -> tuple[float, float]:
    """95 % interval of a standard deviation seen in ``n`` values, by the chi-squared distribution."""
    low, high = (float(stats.chi2.ppf(q, n - 1)) for q in (1 - ALPHA / 2, ALPHA / 2))
    return deviation * math.sqrt((n - 1) / low), deviation * math.sqrt((n - 1) / high)


def ratio_interval(
    arm: Sequence[float], baseline: Sequence[float]
) -> tuple[float, float | None, float | None]:
    """Geometric mean of paired ratios arm / baseline with its 95 % interval (None for one pair)."""
    logs = [math.log(a / b) for a, b in zip(arm, baseline, strict=True)]
    interval = mean_interval(logs)
    if interval is None:
        return math.exp(logs[0]), None, None
    return math.exp(interval.estimate), math.exp(interval.low), math.exp(interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number so that one wrong finding among all stays below alpha
    (Holm 1979, Scandinavian Journal of Statistics 6, 65-70)."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def power(difference: float, spread: float, n: int, alpha: float = ALPHA) -> float:
    """Chance that a paired t-test with ``n`` pairs at level ``alpha`` finds a true ``difference``.

    ``spread`` is the standard deviation of the pairs' differences.
    """
    if n < 2:
        return 0.0
    if spread == 0:
        return 1.0 if difference else alpha
    critical = float(stats.t.ppf(1 - alpha / 2, n - 1))
    shift = abs(difference) / spread * math.sqrt(n)
    # The noncentral t distribution as a mean over the spread that the pairs may show; scipy's own
    # loses its digits for two pairs.
    shares = (np.arange(QUANTILES) + 0.5) / QUANTILES
    reach = critical * np.sqrt(stats.chi2.ppf(shares, n - 1) / (n - 1))
    return float((stats.norm.cdf(shift - reach) + stats.norm.cdf(-shift - reach)).mean())


def detectable_difference(spread: float, n: int, alpha: float = ALPHA) -> float:
    """The true difference that ``n`` pairs would find with a chance of 80 %; infinite for one."""
    if n < 2:
        return math.inf
    if spread == 0:
        return 0.0
    unit = optimize.brentq(lambda d: power(d, 1.0, n, alpha) - POWER, 1e-6, 2000.0)
    return float(unit) * spread


def detectable_by_noise(interval: Interval, alpha: float = ALPHA) -> float:
    """The true difference that one pair with a noise floor would find with a chance of 80 %."""
    reach = stats.t.ppf(1 - alpha / 2, interval.df) + stats.t.ppf(POWER, interval.df)
    return float(reach) * interval.standard_error


def seeds_needed(difference: float, spread: float, alpha: float = ALPHA) -> int | None:
    """Pairs of seeds that find a true ``difference`` with a chance of 80 %; None if over 1,000."""
    if difference == 0:
        return None
    low, high = 2, MOST_SEEDS
    if power(difference, spread, high, alpha) < POWER:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle)
            if power(difference, spread, middle, alpha) >= POWER
            else (middle + 1, high)
        )
    return low
