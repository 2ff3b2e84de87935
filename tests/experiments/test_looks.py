"""Levels of planned looks and always-valid evidence: published constants, quadrature, simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from storylab.experiments.looks import crossing, e_value, look_levels


@pytest.mark.parametrize(
    ("looks", "constant"), [((1, 2), 1.977), ((1, 2, 3), 2.004), ((1, 2, 3, 4, 5), 2.040)]
)
def test_levels_are_those_of_the_published_table(looks: tuple[int, ...], constant: float) -> None:
    """Jennison and Turnbull 2000, Group Sequential Methods, table 2.3, alpha 0.05."""
    values = [constant * math.sqrt(looks[-1] / n) for n in looks]
    expected = [2 * stats.norm.sf(z) for z in values]
    assert look_levels(looks) == pytest.approx(expected, rel=0.01)


def test_the_default_looks_have_the_levels_of_the_documents() -> None:
    assert look_levels((3, 5, 8)) == pytest.approx([0.0011, 0.0115, 0.0457], abs=6e-5)
    assert look_levels((3,)) == [0.05]


@pytest.mark.parametrize("looks", [(3, 5, 8), (2, 3, 4, 5, 6, 7), (3, 50), (9, 10)])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 7])
def test_all_looks_together_spend_the_level(looks: tuple[int, ...], alpha: float) -> None:
    levels = look_levels(looks, alpha)
    assert crossing(looks, levels) == pytest.approx(alpha, rel=1e-6)
    assert levels == sorted(levels)
    # By simulation of the sums themselves.
    paths = np.random.default_rng(3).standard_normal((100_000, looks[-1])).cumsum(1)
    crossed = np.zeros(len(paths), bool)
    for n, level in zip(looks, levels, strict=True):
        crossed |= 2 * stats.norm.sf(np.abs(paths[:, n - 1]) / math.sqrt(n)) < level
    assert crossed.mean() == pytest.approx(alpha, abs=4 * math.sqrt(alpha / 100_000))


def test_an_e_value_is_the_ratio_of_the_marginal_densities_of_t() -> None:
    values = [0.011, 0.016, 0.006, 0.014]
    n = len(values)
    t = float(np.mean(values)) / (float(np.std(values, ddof=1)) / math.sqrt(n))

    def density(effect: float) -> float:
        return float(
            stats.nct.pdf(t, n - 1, effect * math.sqrt(n)) * stats.norm.pdf(effect, scale=2.0)
        )

    marginal, _ = integrate.quad(density, -20, 20, limit=400)
    assert e_value(values) == pytest.approx(marginal / stats.t.pdf(t, n - 1), rel=1e-4)
    assert e_value([0.1]) == 1.0 and e_value([0.0, 0.0]) == 1.0


def test_looking_after_every_seed_does_not_deceive_an_e_value() -> None:
    rng = np.random.default_rng(5)
    paths = rng.normal(0, 0.01, (2000, 20))
    deceived = [max(e_value(list(path[:n])) for n in range(2, 21)) >= 20 for path in paths]
    assert np.mean(deceived) < 0.05
