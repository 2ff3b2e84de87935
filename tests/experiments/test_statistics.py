"""Intervals and tests against scipy's own, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from storylab.experiments import statistics
from storylab.experiments.statistics import (
    Interval,
    detectable_difference,
    holm,
    mean_interval,
    power,
    ratio_interval,
    single_interval,
    story_interval,
    typical_deviation,
    unpaired_interval,
)


def test_the_paired_interval_is_that_of_the_t_test(rng: np.random.Generator) -> None:
    a, b = rng.normal(3.0, 0.01, 6), rng.normal(3.01, 0.01, 6)
    interval = mean_interval(list(a - b))
    reference = stats.ttest_rel(a, b)
    assert interval is not None
    assert interval.p == pytest.approx(reference.pvalue)
    low, high = reference.confidence_interval()
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_the_unpaired_interval_is_welchs(rng: np.random.Generator) -> None:
    a, b = rng.normal(3.0, 0.01, 4), rng.normal(3.01, 0.03, 7)
    interval = unpaired_interval(list(a), list(b))
    reference = stats.ttest_ind(a, b, equal_var=False)
    assert interval is not None
    assert interval.p == pytest.approx(reference.pvalue)
    low, high = reference.confidence_interval()
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_equivalence_is_the_larger_of_two_one_sided_tests(rng: np.random.Generator) -> None:
    values = rng.normal(0.004, 0.01, 8)
    interval = mean_interval(list(values))
    assert interval is not None
    margin = 0.02
    upper = stats.ttest_1samp(values, margin, alternative="less").pvalue
    lower = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    p = max(upper, lower)
    assert interval.is_within(margin, p * 1.001) and not interval.is_within(margin, p * 0.999)


def test_shares_are_compared_by_fishers_test_of_the_lady_tasting_tea() -> None:
    """Fisher 1935: three of four cups right, one-sided 17/70; here two-sided 34/70."""
    assert statistics.shares_p((3, 1), (4, 4)) == pytest.approx(34 / 70)
    low, high = statistics.share_interval(0, 3)
    assert low == 0.0 and high == pytest.approx(1 - 0.025 ** (1 / 3))  # the rule for none of n


def test_holm_is_that_of_the_example_in_wikipedia() -> None:
    """https://en.wikipedia.org/wiki/Holm-Bonferroni_method: 0.01, 0.04, 0.03, 0.005."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_one_run_has_no_interval() -> None:
    assert mean_interval([0.1]) is None
    assert unpaired_interval([0.1], [0.2, 0.3]) is None
    assert ratio_interval([2.0], [1.0]) == (2.0, None, None)


def test_runs_that_are_the_same_to_the_bit_differ_by_nothing() -> None:
    interval = mean_interval([0.0, 0.0, 0.0])
    assert interval is not None and (interval.low, interval.high, interval.p) == (0.0, 0.0, 1.0)


def test_ratios_are_those_of_logarithms() -> None:
    value, low, high = ratio_interval([2.0, 8.0, 4.0], [1.0, 4.0, 2.0])
    assert (value, low, high) == pytest.approx((2.0, 2.0, 2.0))
    value, low, high = ratio_interval([1.0, 4.0], [1.0, 1.0])
    assert low is not None and high is not None
    assert value == pytest.approx(2.0) and low * high == pytest.approx(4.0)


def test_power_is_that_of_simulated_experiments(rng: np.random.Generator) -> None:
    n, spread, difference = 4, 0.003, 0.006
    draws = rng.normal(difference, spread, (20_000, n))
    found = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert power(difference, spread, n) == pytest.approx(found, abs=0.015)


def test_the_detectable_difference_has_the_stated_power() -> None:
    for n in (2, 3, 10):
        assert power(detectable_difference(0.01, n), 0.01, n) == pytest.approx(0.8, abs=1e-3)
    assert detectable_difference(0.01, 1) == math.inf
    # Two pairs among hundreds of arms see next to nothing, which is a number too.
    assert power(detectable_difference(1.0, 2, 0.05 / 500), 1.0, 2, 0.05 / 500) == pytest.approx(
        0.8, abs=1e-3
    )


def simulated_ps(
    rng: np.random.Generator, difference: float, pairs: int, trials: int = 4000
) -> np.ndarray:
    """p-values of simulated paired experiments, with noise that the two arms share and noise of
    their own, drawn from a heavy-tailed distribution rather than the one the test assumes."""
    shared = rng.standard_t(5, (trials, pairs)) * 0.004
    own = rng.standard_t(5, (2, trials, pairs)) * 0.002
    differences = (shared + own[0] + difference) - (shared + own[1])
    intervals = [mean_interval(list(row)) for row in differences]
    return np.array([interval.p for interval in intervals if interval])


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_equal_recipes_are_called_different_at_most_one_time_in_twenty(
    rng: np.random.Generator, pairs: int
) -> None:
    rate = (simulated_ps(rng, 0.0, pairs) < statistics.ALPHA).mean()
    assert rate < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)


def test_a_true_difference_is_found_at_the_stated_power(rng: np.random.Generator) -> None:
    spread = math.sqrt(2 * 5 / 3) * 0.002
    rate = (simulated_ps(rng, detectable_difference(spread, 4), 4) < statistics.ALPHA).mean()
    assert rate == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_one_run_against_a_recipe_of_several_seeds_is_not_overconfident(
    rng: np.random.Generator, seeds: int
) -> None:
    """As the product uses it: the arm against all seeds of the baseline, the one of its pair included."""
    wrong, trials = 0, 4000
    for _ in range(trials):
        baseline, arm = rng.normal(0, 0.003, seeds), rng.normal(0, 0.003)
        spread = float(np.std(baseline, ddof=1))
        interval = single_interval(
            arm - float(baseline.mean()), [(spread, seeds)] * 2, (1, seeds), shared=True
        )
        wrong += interval.p < statistics.ALPHA
    assert wrong / trials == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / trials))


def test_the_story_interval_covers_the_difference_of_the_population(
    rng: np.random.Generator,
) -> None:
    """Stories with lengths, difficulties and gains of their own; the truth is known."""
    population = 200_000
    tokens = rng.integers(50, 400, population).astype(float)
    baseline = tokens * rng.gamma(9.0, 0.2, population)
    arm = baseline + tokens * rng.normal(0.01, 0.05, population) + rng.normal(0, 1, population)
    truth = (arm - baseline).sum() / tokens.sum()
    covered, trials = 0, 1000
    for _ in range(trials):
        chosen = rng.integers(0, population, 300)
        interval = story_interval(arm[chosen], baseline[chosen], tokens[chosen])
        assert interval is not None
        covered += interval.low <= truth <= interval.high
    assert covered / trials == pytest.approx(0.95, abs=0.025)


def test_pairing_by_story_narrows_the_interval(rng: np.random.Generator) -> None:
    tokens = rng.integers(50, 400, 2000).astype(float)
    baseline = tokens * rng.gamma(9.0, 0.2, 2000)
    arm = baseline + tokens * rng.normal(0.01, 0.02, 2000)
    paired = story_interval(arm, baseline, tokens)
    assert paired is not None
    unpaired = math.sqrt(np.var(arm / tokens) / 2000 + np.var(baseline / tokens) / 2000)
    assert paired.standard_error < unpaired / 10


def test_an_interval_reads_the_right_way_round() -> None:
    interval = Interval(-0.01, 0.001, 2, 3)
    assert interval.low < interval.estimate < interval.high < 0


def test_a_typical_deviation_is_right_in_the_median_and_ignores_a_broken_pair() -> None:
    rng = np.random.default_rng(2)
    samples = [list(values) for values in rng.normal(0, 2.0, (4001, 3))]
    found = typical_deviation(samples)
    assert found is not None and abs(found - 2.0) < 0.1
    assert typical_deviation([*samples, [0.0, 1e6]]) == pytest.approx(found, rel=0.01)
    assert typical_deviation([]) is None and typical_deviation([[1.0]]) is None


def test_the_interval_of_a_deviation_is_that_of_tables() -> None:
    """Quantiles of chi-squared with 9 degrees of freedom: 2.7004 and 19.0228."""
    low, high = statistics.deviation_interval(2.0, 10)
    assert low == pytest.approx(2 * math.sqrt(9 / 19.0228), rel=1e-4)
    assert high == pytest.approx(2 * math.sqrt(9 / 2.7004), rel=1e-4)


def test_the_median_of_chi_squared_with_two_degrees_of_freedom_is_twice_the_logarithm_of_two() -> (
    None
):
    assert statistics.median_unbiased(3.0, 3) == pytest.approx(3 / math.sqrt(math.log(2)))
    # A table's median for three degrees of freedom.
    assert statistics.median_unbiased(1.0, 4) == pytest.approx(math.sqrt(3 / 2.36597), rel=1e-5)


def test_a_scaled_difference_keeps_its_degrees_of_freedom() -> None:
    interval = Interval(0.5, 0.25, 7, 8)
    assert interval.scaled(3.0) == Interval(1.5, 0.75, 7, 8)
    assert interval.scaled(3.0).p == pytest.approx(interval.p)
    assert interval.scaled(-3.0) == Interval(-1.5, 0.75, 7, 8)


@pytest.mark.parametrize(("estimate", "p"), [(0.0, 1.0), (0.1, 0.0), (-0.1, 0.0)])
def test_runs_without_spread_differ_for_certain_or_not_at_all(estimate: float, p: float) -> None:
    assert Interval(estimate, 0.0, 4, 5).p == p
    same = unpaired_interval([2.0 + estimate] * 2, [2.0] * 3)
    assert same is not None and (same.p, same.df, same.n) == (p, 3, 2)


def test_two_recipes_noises_have_welchs_degrees_of_freedom(rng: np.random.Generator) -> None:
    a, b = rng.normal(3.0, 0.01, 4), rng.normal(3.01, 0.03, 7)
    noises = [(float(np.std(values, ddof=1)), len(values)) for values in (a, b)]
    interval = single_interval(float(a.mean() - b.mean()), noises, (4, 7), shared=False)
    reference = stats.ttest_ind(a, b, equal_var=False)
    assert (interval.df, interval.p) == pytest.approx((reference.df, reference.pvalue))
    # Of the baseline's seeds alone, where both recipes are taken for equally noisy.
    assert single_interval(0.0, [noises[0]] * 2, (1, 4), shared=True).df == 3


def test_the_correlation_is_of_three_pairs_that_vary() -> None:
    assert statistics.correlation([1.0, 2.0, 3.0], [2.0, 4.0, 5.0]) == pytest.approx(
        stats.pearsonr([1, 2, 3], [2, 4, 5]).statistic
    )
    assert statistics.correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert statistics.correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert statistics.correlation([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) is None


def test_without_spread_a_difference_is_found_at_once() -> None:
    assert power(0.1, 0.0, 2) == 1.0
    assert power(0.0, 0.0, 2, alpha=0.01) == 0.01
    assert power(0.1, 0.1, 1) == 0.0
    assert detectable_difference(0.0, 2) == 0.0
    assert detectable_difference(0.1, 1) == math.inf
    assert typical_deviation([[], [1.0], [2.0, 2.0]]) is None
    assert typical_deviation([[], [1.0], [2.0, 2.5]]) is not None
