"""Intervals, tests and power for differences between runs; scipy does the distributions.

Differences are loss of the arm minus loss of the baseline, in nats, so that below zero is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

ALPHA = 0.05
LEVEL = 1 - ALPHA
POWER = 0.8
QUANTILES = 4000


@dataclass(frozen=True)
class Interval:
    """A difference with its standard error; intervals and tests are Student's with ``df``."""

    estimate: float
    standard_error: float
    df: float
    n: int

    def ends(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Ends of the two-sided interval that misses the true value with a chance of ``alpha``."""
        # As scipy.stats.t does it, a hundred times as fast.
        reach = abs(float(special.stdtrit(self.df, alpha / 2))) * self.standard_error
        if math.isnan(reach):  # a level too small for a number, of runs that are equal to the bit
            reach = 0.0
        return self.estimate - reach, self.estimate + reach

    def scaled(self, factor: float) -> Interval:
        """The interval of ``factor`` times the difference."""
        return Interval(self.estimate * factor, self.standard_error * abs(factor), self.df, self.n)

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.ends()[0]

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.ends()[1]

    @property
    def p(self) -> float:
        """Two-sided p-value of "no difference"."""
        if self.standard_error == 0:
            return 1.0 if self.estimate == 0 else 0.0
        return float(2 * special.stdtr(self.df, -abs(self.estimate) / self.standard_error))

    def is_within(self, margin: float, alpha: float = ALPHA) -> bool:
        """Whether two one-sided tests at ``alpha`` reject a difference of ``margin`` or more
        (Schuirmann 1987, doi 10.1007/BF01068419): the interval at twice the level is within it."""
        low, high = self.ends(2 * alpha)
        return -margin < low and high < margin


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


def single_interval(
    difference: float,
    noises: Sequence[tuple[float, int]],
    runs: tuple[int, int],
    shared: bool,
) -> Interval:
    """Interval of a difference between means of which one is a single run, from known seed noise.

    Args:
        difference: mean loss of the arm minus that of the baseline.
        noises: standard deviation of the loss over seeds, and number of those seeds, of each recipe.
        runs: runs behind each mean.
        shared: whether the noise of one recipe counts for both. It is right for recipes that are equally
            noisy; one run cannot show whether they are.
    """
    # The losses as if independent: shared weights and order can only make the spread less.
    terms = [s**2 / n for (s, _), n in zip(noises, runs, strict=True)]
    dfs = [seeds - 1 for _, seeds in noises]
    total = sum(terms)
    df = float(dfs[0])
    if not shared and total:  # Welch's degrees of freedom
        df = total**2 / sum(term**2 / f for term, f in zip(terms, dfs, strict=True))
    return Interval(difference, math.sqrt(total), df, 1)


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


def median_unbiased(deviation: float, n: int) -> float:
    """A standard deviation seen in ``n`` values, corrected so that it is too large as often as too small.

    Without it, three values give less than the true deviation in 63 % of samples. The values are normal.
    """
    return deviation * math.sqrt((n - 1) / float(stats.chi2.median(n - 1)))


def typical_deviation(samples: Iterable[Sequence[float]]) -> float | None:
    """Root of the median variance of samples, each by :func:`median_unbiased`; None without any spread.

    The median keeps a sample with a broken run from deciding.
    """
    variances = [
        median_unbiased(float(np.std(values, ddof=1)), len(values)) ** 2
        for values in samples
        if len(values) > 1
    ]
    found = float(np.median(variances)) if variances else 0.0
    return math.sqrt(found) if found > 0 else None


def ratio_interval(
    arm: Sequence[float], baseline: Sequence[float]
) -> tuple[float, float | None, float | None]:
    """Geometric mean of paired ratios arm / baseline with its 95 % interval (None for one pair)."""
    logs = [math.log(a / b) for a, b in zip(arm, baseline, strict=True)]
    interval = mean_interval(logs)
    if interval is None:
        return math.exp(logs[0]), None, None
    return math.exp(interval.estimate), math.exp(interval.low), math.exp(interval.high)


def correlation(arm: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Pearson's correlation of paired losses over seeds; None for fewer than three or constant ones."""
    if len(arm) < 3 or min(np.ptp(arm), np.ptp(baseline)) == 0:
        return None
    return float(np.corrcoef(arm, baseline)[0, 1])


def share_interval(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Clopper and Pearson 1934, doi 10.1093/biomet/26.4.404)."""
    found = stats.binomtest(count, n).proportion_ci(LEVEL)
    return float(found.low), float(found.high)


def shares_p(counts: tuple[int, int], sizes: tuple[int, int]) -> float:
    """Two-sided p-value of "both shares are equal" by Fisher's exact test."""
    table = [counts, [n - c for c, n in zip(counts, sizes, strict=True)]]
    return float(stats.fisher_exact(table).pvalue)


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


def power(
    difference: float, spread: float, n: int, alpha: float = ALPHA, df: float | None = None
) -> float:
    """Chance that a paired test with ``n`` pairs at level ``alpha`` finds a true ``difference``.

    Args:
        difference: the true difference.
        spread: standard deviation of the pairs' differences.
        n: pairs.
        alpha: two-sided level.
        df: degrees of freedom of the spread's estimate; by default those of the pairs alone.
    """
    if n < 2:
        return 0.0
    if spread == 0:
        return 1.0 if difference else alpha
    df = n - 1 if df is None else df
    critical = float(stats.t.isf(alpha / 2, df))
    shift = abs(difference) / spread * math.sqrt(n)
    # The noncentral t distribution as a mean over the spread that the pairs may show; scipy's own
    # loses its digits for two pairs.
    shares = (np.arange(QUANTILES) + 0.5) / QUANTILES
    reach = critical * np.sqrt(stats.chi2.ppf(shares, df) / df)
    return float((stats.norm.cdf(shift - reach) + stats.norm.cdf(-shift - reach)).mean())


def detectable_difference(
    spread: float, n: int, alpha: float = ALPHA, df: float | None = None
) -> float:
    """The true difference that ``n`` pairs would find with a chance of 80 %; infinite for one."""
    if n < 2:
        return math.inf
    if spread == 0:
        return 0.0
    most = 2.0
    while power(most, 1.0, n, alpha, df) < POWER:
        most *= 4
    unit = optimize.brentq(lambda d: power(d, 1.0, n, alpha, df) - POWER, 1e-6, most)
    return float(unit) * spread
