"""Arms judged together: Holm's method, planned looks, settled arms, and the error that is promised."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from storylab.experiments.family import Judgement, Rules, Trial, describe, judge
from storylab.experiments.looks import look_levels
from storylab.experiments.statistics import Interval
from storylab.experiments.variance import pooled_intervals

SEEDS = tuple(range(8))


def trial(values: Sequence[float], group: str = "", **options: bool) -> Trial:
    """An arm whose first seeds have these differences."""
    differences = dict(enumerate(map(float, values)))
    return Trial(group, differences, frozenset(differences), **options)


def with_p(p: float) -> Trial:
    """An arm whose interval has this p-value."""
    return Trial("", {}, frozenset(), Interval(float(stats.t.isf(p / 2, 9)), 1.0, 9, 10))


def test_without_looks_arms_are_judged_by_holms_method() -> None:
    """https://en.wikipedia.org/wiki/Holm-Bonferroni_method: of 0.01, 0.04, 0.03, 0.005 two are found."""
    found = judge([with_p(p) for p in (0.01, 0.04, 0.03, 0.005)], Rules())
    assert [j.different for j in found] == [True, False, False, True]
    assert all(j.family == 4 and j.alpha == 0.05 / 4 for j in found)


def test_arms_that_cannot_be_tested_take_no_level_from_the_others() -> None:
    found = judge([with_p(0.03), trial([], testable=False)], Rules())
    assert found[0].different and found[0].family == 1
    assert not found[1].different and found[1].interval is None


def test_verdicts_are_made_at_planned_looks_alone() -> None:
    rules = Rules((3, 5, 8), SEEDS, "own")
    steady = [0.1, 0.1001, 0.0999, 0.1, 0.1002]
    (before,) = judge([trial(steady[:2])], rules)
    assert before.look is None and before.interval is None and before.next_look == 3
    (first,) = judge([trial(steady[:3])], rules)
    (between,) = judge([trial(steady[:4])], rules)
    assert first.look == between.look == 3
    assert first.interval == between.interval and between.extra_seeds == 1
    assert between.e is not None and first.e is None


def test_a_settled_arm_keeps_its_judgement_and_the_others_go_on() -> None:
    rules = Rules((3, 5, 8), SEEDS, "own")
    sure, open_still = [0.1, 0.1001, 0.0999], [0.01, -0.02, 0.013, 0.002, -0.001]
    found = judge([trial([*sure, -9.0, 9.0]), trial(open_still)], rules)
    assert found[0].different and found[0].look == 3 and found[0].next_look is None
    assert found[1].look == 5 and found[1].next_look == 8 and not found[1].different


def test_a_look_has_its_own_level() -> None:
    rules = Rules((3, 5, 8), SEEDS, "own")
    for n, level in zip((3, 5, 8), look_levels((3, 5, 8), 0.05), strict=True):
        (j,) = judge([trial([0.02, -0.02, 0.01, 0.015, -0.012, 0.003, 0.01, -0.018][:n])], rules)
        assert j.alpha == level and j.look == n


def test_a_seed_that_failed_does_not_hold_a_look_back() -> None:
    arm = Trial("", {0: 0.1, 2: 0.1001}, frozenset({0, 1, 2}))
    (j,) = judge([arm], Rules((3,), SEEDS, "own"))
    assert j.look == 3 and j.interval is not None and j.interval.n == 2


def test_equivalence_and_difference_can_both_hold() -> None:
    (j,) = judge([trial([0.010, 0.0101, 0.0099])], Rules(margin=0.02))
    assert j.different and j.equivalent
    (j,) = judge([trial([0.001, -0.001, 0.0])], Rules(margin=0.02))
    assert not j.different and j.equivalent
    assert j.equivalence_ends is not None and max(map(abs, j.equivalence_ends)) < 0.02


def test_an_interval_beside_less_than_the_margin_is_within_the_margin() -> None:
    """Found by chance: the interval of equivalence was within the margin, the printed one was not."""
    (j,) = judge([trial([0.0082, 0.0129, 0.0120])], Rules(margin=0.0172))
    assert j.ends is not None and j.ends[0] > 0 and j.ends[1] > 0.0172
    assert j.equivalence_ends is not None and j.equivalence_ends[1] < 0.0172
    assert j.different and not j.equivalent and j.settled


@pytest.mark.parametrize(("share", "equivalent"), [(1.0001, True), (0.9999, False)])
def test_a_difference_is_equivalent_if_the_whole_printed_interval_is_within_the_margin(
    share: float, equivalent: bool
) -> None:
    arms = [trial([0.0082, 0.0129, 0.0120]), trial([0.0182, 0.0139, 0.0120])]
    ends = judge(arms, Rules())[0].ends
    assert ends is not None
    found = judge(arms, Rules(margin=share * ends[1]))[0]
    assert found.different and found.equivalent is equivalent and found.ends == ends
    assert found.interval is not None
    assert found.equivalence_ends == found.interval.ends(2 * found.alpha)


def test_the_cells_of_a_design_are_described_and_not_judged() -> None:
    rules = Rules((3,), SEEDS, "own", margin=0.2)
    for found in describe([trial([0.1, 0.1001, 0.0999, 0.2]), trial([0.1, 0.3])], rules):
        assert found.described and not found.different and not found.equivalent
        assert (found.family, found.alpha, found.look) == (1, 0.05, None)
        assert found.interval is not None  # of all its seeds
    assert describe([trial([0.1, 0.3, 0.2, 0.2])], rules)[0].interval == Interval(
        0.2, pytest.approx(math.sqrt(0.02 / 3 / 4)), 3, 4
    )


def test_a_pooled_variance_is_that_of_the_arms_judged_at_a_look() -> None:
    """The settled arm has other seeds, and an arm with one seed shows no noise."""
    rules = Rules((3, 5, 8), SEEDS, "pooled")
    settled = trial([0.5, 0.5101, 0.4999])
    others = [[0.01, -0.02, 0.013, 0.002, -0.001], [0.012, 0.0, -0.013, 0.012, -0.01]]
    lone = Trial("", {0: 0.1}, frozenset(range(8)))
    found = judge([settled, lone, *map(trial, others)], rules)
    assert found[0].look == 3 and found[0].settled and found[0].variance == "pooled"
    assert found[1].interval is None
    assert [j.interval for j in found[2:]] == pooled_intervals(others)
    assert {(j.look, j.variance) for j in found[2:]} == {(5, "pooled")}


def test_a_seed_that_is_void_later_leaves_the_judgement_of_a_look() -> None:
    """Arms that diverge after a look had lent their noise at it, and had their share of the level."""
    values = [[0.0324, 0.0358, 0.0323], [-0.0027, 0.0019, 0.0009], [-0.0011, 0.0012, 0.0008]]
    arms = [trial(row) for row in (*values, [0.0006, 0.0001, 0.0011])]
    rules = Rules((3, 5, 8), SEEDS)
    before = judge(arms, rules)
    assert before[0].settled and before[0].look == 3
    lost = [
        dataclasses.replace(arm, void=frozenset({4}), ended=frozenset(range(5))) for arm in arms[1:]
    ]
    after = judge([arms[0], *lost], rules)
    assert after[0] == before[0]
    # The void arms are judged no more, and the look that found them so is theirs.
    assert after[1].look == 5 and after[1].interval is None and not after[1].settled


def test_at_a_planned_look_only_its_seeds_count() -> None:
    """An interval of other runs, unpaired, would bring in those that no look has planned."""
    arm = Trial("", {0: 0.1}, frozenset(range(3)), Interval(0.1, 0.001, 9, 10))
    (j,) = judge([arm], Rules((3,), SEEDS))
    assert j.look == 3 and j.interval is None and not j.settled


def test_noise_is_borrowed_within_a_condition_only() -> None:
    quiet = [trial([0.01, 0.0101, 0.0102], "a") for _ in range(4)]
    loud = [trial([0.3, -0.2, 0.1], "b") for _ in range(4)]
    alone = judge(quiet, Rules())[0]
    together = judge([*quiet, *loud], Rules())[0]
    assert alone.interval == together.interval


def drawn(rng: np.random.Generator, deviations: Sequence[float], shift: float = 0.0) -> list[Trial]:
    """Arms that share a baseline, each run with noise of its own; the last arm differs by ``shift``."""
    noise = rng.standard_normal((len(deviations) + 1, 8)) * np.array([0.005, *deviations])[:, None]
    differences = noise[1:] - noise[0]
    differences[-1] += shift
    return [trial(row) for row in differences]


def wrong(judgements: Sequence[Judgement]) -> bool:
    return any(j.different for j in judgements)


@pytest.mark.slow
@pytest.mark.parametrize("looks", [(3,), (3, 5, 8)])
@pytest.mark.parametrize("kind", ["alike", "one wild"])
def test_equal_arms_are_called_different_as_seldom_as_promised(
    looks: tuple[int, ...], kind: str
) -> None:
    """5 % where arms are alike; docs/statistics.md prints what it is where they are not."""
    rng = np.random.default_rng(17)
    deviations = [0.005] * 6 if kind == "alike" else [0.03, *[0.005] * 5]
    rules = Rules(looks, SEEDS)
    n = 500
    rate = sum(wrong(judge(drawn(rng, deviations), rules)) for _ in range(n)) / n
    most = 0.05 if kind == "alike" else (0.11 if looks == (3,) else 0.08)
    assert rate < most + 3 * math.sqrt(most * (1 - most) / n)


def test_confirmation_holds_whatever_the_noise() -> None:
    rng = np.random.default_rng(19)
    rules = Rules((5,), SEEDS, "own")
    n = 600
    rate = sum(wrong(judge(drawn(rng, [0.03, *[0.005] * 5]), rules)) for _ in range(n)) / n
    assert rate < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)


def test_six_arms_and_three_seeds_see_what_one_arms_own_noise_does_not() -> None:
    rng = np.random.default_rng(23)
    deviations = [0.005] * 6
    n = 300

    def share(rules: Rules) -> float:
        found = (judge(drawn(rng, deviations, 0.02), rules)[-1].different for _ in range(n))
        return sum(found) / n

    moderated, own = share(Rules((3,), SEEDS)), share(Rules((3,), SEEDS, "own"))
    assert moderated > 0.57 and own < 0.3


def test_the_interval_that_is_shown_covers_all_arms_together() -> None:
    rng = np.random.default_rng(29)
    n, missed = 500, 0
    for _ in range(n):
        ends = [j.ends for j in judge(drawn(rng, [0.005] * 6), Rules((3,), SEEDS))]
        missed += any(e is not None and not e[0] <= 0 <= e[1] for e in ends)
    assert missed / n < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
