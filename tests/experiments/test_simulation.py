"""The simulation behind docs/statistics.md: it draws what it says, and the page has its tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import intervals_cover
import verdicts
from storylab.experiments.curve_comparison import equal_time, reach
from storylab.experiments.family import Judgement
from storylab.experiments.looks import DEFAULT_LOOKS
from storylab.experiments.statistics import Interval

PAGE = Path(__file__).parents[2] / "docs" / "statistics.md"


@pytest.mark.parametrize("kind", verdicts.KINDS)
def test_arms_share_the_noise_of_their_baseline(kind: str) -> None:
    rng = np.random.default_rng(1)
    table = np.concatenate([verdicts.differences(rng, kind, 3, 8) for _ in range(2000)], axis=1)
    deviation = np.median(np.abs(table), axis=1) / 0.6745
    if kind == "equal":
        assert deviation == pytest.approx([verdicts.NOISE * 2**0.5] * 3, rel=0.05)
        assert np.corrcoef(table)[0, 1] == pytest.approx(0.5, abs=0.05)
    if kind == "wild":
        assert deviation[0] == pytest.approx(verdicts.NOISE * 37**0.5, rel=0.05)
        assert deviation[1] == pytest.approx(verdicts.NOISE * 2**0.5, rel=0.05)
    assert abs(float(np.median(table))) < 0.001


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (verdicts.errors, 2),
        (verdicts.promises, 1),
        (verdicts.powers, 3),
        (verdicts.equivalences, 2),
    ],
)
def test_the_page_has_the_rows_of_every_table(make: verdicts.Table, count: int) -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in make(count) if line.startswith("| ")]
    assert len(rows) > 2
    for first, second in rows:
        assert f"{first} | {second}" in page


def test_every_rule_that_an_experiment_may_have_is_simulated() -> None:
    assert {variance for _, variance in verdicts.RULES} == {"moderated", "own", "pooled"}
    assert {looks for looks, _ in verdicts.RULES} >= {(3,), (5,), (8,), DEFAULT_LOOKS}


def test_the_simulated_curves_are_as_far_apart_as_they_say() -> None:
    rng = np.random.default_rng(2)
    pairs = [intervals_cover._pair(rng) for _ in range(200)]
    found = reach(pairs, True)
    assert found is not None and found.seconds is not None
    assert found.tokens.value == pytest.approx(1.3, rel=0.03)
    assert found.seconds.value == pytest.approx(1.3 / 1.1, rel=0.03)
    time = equal_time("a", "b", pairs)
    assert time is not None and time.difference < 0 and time.slower == "a"


def test_the_interval_over_seeds_and_stories_is_no_wider_than_its_parts_need() -> None:
    """Three seeds with next to no noise: thousands of stories decide, by nearly the normal distribution."""
    stories = Interval(0.01, 0.004, 3999, 4000)
    both = intervals_cover.comparison(Judgement(Interval(0.01, 1e-6, 2, 3)), stories).over_both
    assert both is not None and both.high - both.low == pytest.approx(2 * 1.96 * 0.004, rel=0.001)
    both = intervals_cover.comparison(Judgement(Interval(0.01, 0.04, 2, 3)), stories).over_both
    assert both is not None and both.df == pytest.approx(2, rel=0.03)
