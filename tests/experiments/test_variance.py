"""Variance models against least squares, known priors and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from storylab.experiments.variance import (
    intervals,
    moderated_intervals,
    pooled_contrasts,
    pooled_intervals,
    prior_of,
)


@pytest.mark.parametrize("df", [1.0, 2.0, 3.5])
def test_the_prior_of_many_arms_is_the_one_they_were_drawn_from(
    rng: np.random.Generator, df: float
) -> None:
    """Smyth's model: variances are d0 s0^2 over chi-squared of d0, seen with f degrees of freedom."""
    true = df * 0.01**2 / rng.chisquare(df, 20_000)
    dfs = rng.integers(2, 9, 20_000)
    seen = true * rng.chisquare(dfs) / dfs
    prior = prior_of(list(seen), list(dfs))
    assert prior is not None
    assert prior.df == pytest.approx(df, rel=0.1)
    assert prior.variance == pytest.approx(0.01**2, rel=0.1)


def test_alike_arms_lend_no_more_than_four_degrees_of_freedom(rng: np.random.Generator) -> None:
    seen = 0.01**2 * rng.chisquare(2, 5000) / 2
    prior = prior_of(list(seen), [2] * 5000)
    assert prior is not None and prior.df == 4.0
    # The median of what the prior says of a variance is near the true one.
    assert prior.variance == pytest.approx(0.01**2, rel=0.25)


def test_two_arms_and_arms_equal_to_the_bit_borrow_nothing() -> None:
    assert prior_of([1.0, 2.0], [2, 2]) is None
    assert prior_of([0.0, 0.0, 0.0], [2, 2, 2]) is None
    (own, other), variance = moderated_intervals([[0.1, 0.2, 0.4], [0.0, 0.3, 0.1]])
    assert variance == "own"
    assert own is not None and other is not None
    assert own.p == pytest.approx(stats.ttest_1samp([0.1, 0.2, 0.4], 0).pvalue)
    zeros, _ = moderated_intervals([[0.0] * 3] * 4)
    assert all(i is not None and i.p == 1.0 and i.ends(1e-9) == (0.0, 0.0) for i in zeros)


def test_a_moderated_error_is_between_its_own_and_that_of_all(rng: np.random.Generator) -> None:
    values = rng.normal(0, 0.01, (5, 3)) * np.array([1, 1, 1, 1, 4])[:, None]
    for own, i in zip(values, moderated_intervals(values.tolist())[0], strict=True):
        assert i is not None and i.estimate == pytest.approx(own.mean())
        assert 2 < i.df <= 6 and i.n == 3


def test_a_pooled_error_is_that_of_a_two_way_least_squares(rng: np.random.Generator) -> None:
    arms, n = 4, 5
    losses = rng.normal(3.4, 0.01, n)[None, :] + rng.normal(0, 0.004, (arms + 1, n))
    differences = (losses[1:] - losses[0]).tolist()
    found = pooled_intervals(differences)
    # Indicator columns of arms and seeds, solved by least squares: an independent path to the residual.
    design = np.zeros(((arms + 1) * n, arms + 1 + n))
    for arm in range(arms + 1):
        for seed in range(n):
            design[arm * n + seed, arm] = design[arm * n + seed, arms + 1 + seed] = 1
    rest = losses.ravel() - design @ np.linalg.lstsq(design, losses.ravel(), rcond=None)[0]
    df = arms * (n - 1)
    error = np.sqrt(2 * (rest @ rest) / df / n)
    assert found is not None
    assert [i.standard_error for i in found if i] == pytest.approx([error] * arms)
    assert {i.df for i in found if i} == {df}


def test_arms_of_unlike_noise_are_not_pooled(rng: np.random.Generator) -> None:
    values = (rng.normal(0, 0.01, (4, 8)) * np.array([1, 1, 1, 30])[:, None]).tolist()
    assert pooled_intervals(values) is None
    assert intervals(values, "pooled")[1] == "moderated"
    assert pooled_intervals([[0.1, 0.2], [0.1, 0.2, 0.3]]) is None
    assert intervals([], "pooled") == ([], "pooled")


def test_pooled_contrasts_have_the_mean_of_their_variances() -> None:
    """Variances 1, 4 and 7 / 3 about means 1, 4 and 2 / 3: their mean is 22 / 9."""
    contrasts = [[0.0, 1.0, 2.0], [2.0, 4.0, 6.0], [-1.0, 1.0, 2.0]]
    found = pooled_contrasts(contrasts)
    assert found is not None
    assert [i.estimate for i in found if i] == pytest.approx([1, 4, 2 / 3])
    assert [i.standard_error for i in found if i] == pytest.approx([np.sqrt(22 / 9 / 3)] * 3)
    assert {(i.df, i.n) for i in found if i} == {(6, 3)}
    assert intervals(contrasts, "pooled", shared_baseline=False) == (found, "pooled")
    assert intervals(contrasts, "pooled") == (pooled_intervals(contrasts), "pooled")


def test_one_seed_is_not_pooled() -> None:
    assert pooled_intervals([[0.1], [0.2], [0.3]]) is None
    assert pooled_contrasts([[0.1], [0.2], [0.3]]) is None
