"""Judge the arms of an experiment together, at its planned looks.

Every arm is compared with the baseline, and the chance of at least one wrong finding among all of them,
at any look, is held at 5 %: by O'Brien and Fleming's levels over the looks and Holm's step-down method
over the arms (Maurer and Bretz 2013, doi 10.1080/19466315.2013.807748). An arm that is
settled at a look keeps that judgement. docs/statistics.md has the simulations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from storylab.experiments.experiment import Variance
from storylab.experiments.looks import e_value, look_levels
from storylab.experiments.statistics import ALPHA, Interval
from storylab.experiments.variance import intervals


@dataclass(frozen=True)
class Rules:
    """How an experiment is judged.

    Args:
        looks: numbers of seeds at the planned looks; empty for one look at whatever there is.
        seeds: the seeds in the order of the plan, at least as many as the last look needs.
        variance: how the noise of a difference is estimated.
        margin: the largest difference in nats that counts as none; None for no test of equivalence.
        shared_baseline: whether all differences are to one baseline; else they are independent.
    """

    looks: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    variance: Variance = "moderated"
    margin: float | None = None
    shared_baseline: bool = True


@dataclass(frozen=True)
class Trial:
    """The facts known of one arm against its baseline.

    Args:
        group: the condition; noise is borrowed within a group.
        differences: arm minus baseline in nats, of every seed that finished in both.
        ended: seeds that have ended in both, with or without a loss.
        other: an interval that is not of paired differences, of arms without enough pairs and without
            planned looks.
        testable: whether a loss may be compared at all.
        void: seeds with which none may be: they are confounded, or a run diverged.
        scale: the standard deviation of its differences is expected to be this many times that of a trial
            of scale 1.
    """

    group: str
    differences: Mapping[int, float]
    ended: frozenset[int]
    other: Interval | None = None
    testable: bool = True
    void: frozenset[int] = frozenset()
    scale: float = 1.0

    def testable_with(self, seeds: Sequence[int] | None) -> bool:
        """Whether the losses of these seeds may be compared; of all its seeds, if None."""
        return self.testable and (not self.void if seeds is None else self.void.isdisjoint(seeds))


@dataclass(frozen=True)
class Judgement:
    """The judgement of one arm.

    ``different`` and ``equivalent`` hold for all arms of the family together.
    """

    interval: Interval | None = None
    family: int = 1
    alpha: float = ALPHA
    """Level of the interval that holds for all arms together: that of the look over the arms."""
    margin: float | None = None
    different: bool = False
    equivalent: bool = False
    look: int | None = None
    """Number of planned seeds that it was judged at; None without a plan, or before the first look."""
    next_look: int | None = None
    variance: Variance = "moderated"
    extra_seeds: int = 0
    """Seeds beyond the look, which the judgement leaves out."""
    e: float | None = None
    """Always-valid evidence of all seeds; None where no seed is unplanned."""
    described: bool = False
    """Whether the interval describes a cell of a factorial experiment, which has no verdict of its own."""

    @property
    def ends(self) -> tuple[float, float] | None:
        """The interval that belongs to a difference, or to its absence."""
        return self.interval.ends(self.alpha) if self.interval else None

    @property
    def equivalence_ends(self) -> tuple[float, float] | None:
        """The interval that belongs to equivalence: within the margin, both one-sided tests reject."""
        return self.interval.ends(2 * self.alpha) if self.interval else None

    @property
    def settled(self) -> bool:
        """Whether a planned look has decided it."""
        return self.different or self.equivalent


def judge(trials: Sequence[Trial], rules: Rules) -> list[Judgement]:
    """Judge arms together.

    Args:
        trials: the arms, of all conditions.
        rules: looks, seeds, variance and margin.

    Returns:
        One judgement for every trial, that of the last look which it has reached.
    """
    judging = _Judging(trials, rules)
    for number in range(len(rules.looks or (None,))):
        judging.look(number)
    return [_with_extras(trial, j, rules) for trial, j in zip(trials, judging.found, strict=True)]


def describe(trials: Sequence[Trial], rules: Rules) -> list[Judgement]:
    """The 95 % interval of every trial alone, by all of its seeds, without a verdict."""
    every = dataclasses.replace(rules, looks=(), margin=None)
    return [
        dataclasses.replace(j, family=1, alpha=ALPHA, different=False, described=True)
        for j in judge(trials, every)
    ]


class _Judging:
    """Judges trials one look after the other; ``found`` has the judgement of each so far."""

    def __init__(self, trials: Sequence[Trial], rules: Rules) -> None:
        self.found = [Judgement(margin=rules.margin)] * len(trials)
        self._trials, self._rules = trials, rules

    def look(self, number: int) -> None:
        """Judge the trials that are not settled and have reached the look of this ``number``."""
        rules, trials = self._rules, self._trials
        look = rules.looks[number] if rules.looks else None
        seeds = rules.seeds[:look] if look is not None else None
        # Each look counts and borrows from the arms that its seeds allow, so that no later seed changes it.
        testable = {
            index
            for index, trial in enumerate(trials)
            if self.found[index].settled or trial.testable_with(seeds)
        }
        reached = {
            index
            for index, trial in enumerate(trials)
            if not self.found[index].settled and (seeds is None or trial.ended.issuperset(seeds))
        }
        family = max(1, len(testable))
        blank = Judgement(family=family, alpha=ALPHA / family, margin=rules.margin, look=look)
        for index, judgement in enumerate(self.found):
            if index in reached:
                self.found[index] = blank
            elif judgement.look is None:
                self.found[index] = dataclasses.replace(blank, look=None)
        self._measure(reached & testable, testable, seeds)
        self._step_down(reached & testable, number, family)

    def _measure(self, open_now: Set[int], testable: Set[int], seeds: Sequence[int] | None) -> None:
        """Give the trials in ``open_now`` their intervals, by the variances of all that are testable."""
        for group in dict.fromkeys(self._trials[index].group for index in open_now):
            used = {
                index: self._differences(index, seeds if index in open_now else None)
                for index in sorted(testable)
                if self._trials[index].group == group
            }
            # One pooled variance needs arms with the same seeds: those that are judged now.
            members = [
                index
                for index, values in used.items()
                if len(values) > 1 and (index in open_now or self._rules.variance != "pooled")
            ]
            scales = [self._trials[index].scale for index in members]
            values, variance = intervals(
                [[d / scale for d in used[i]] for i, scale in zip(members, scales, strict=True)],
                self._rules.variance,
                self._rules.shared_baseline,
            )
            known = {
                index: value.scaled(scale) if value else None
                for index, value, scale in zip(members, values, scales, strict=True)
            }
            for index in open_now & used.keys():
                other = None if self._rules.looks else self._trials[index].other
                self.found[index] = dataclasses.replace(
                    self.found[index],
                    interval=known.get(index) or other,
                    variance=variance if index in known else "own",
                )

    def _differences(self, index: int, seeds: Sequence[int] | None) -> list[float]:
        """Differences of the ``seeds`` of a look; without them those of the trial's own last look."""
        differences = self._trials[index].differences
        if seeds is None:
            if not self._rules.looks:
                return list(differences.values())
            seeds = self._rules.seeds[: self.found[index].look or 0]
        return [differences[seed] for seed in seeds if seed in differences]

    def _step_down(self, open_now: Set[int], number: int, family: int) -> None:
        """Holm's method at a look: the smallest p-value first, each at the level that is left over the
        hypotheses that are left."""
        looks = self._rules.looks or (1,)
        alone = look_levels(looks, ALPHA / family)[number]
        rejected = sum(judgement.different for judgement in self.found)
        stopped = False
        for index in sorted(open_now, key=lambda i: _p(self.found[i])):
            left = max(1, family - rejected)
            stopped = (
                stopped or not _p(self.found[index]) < look_levels(looks, ALPHA / left)[number]
            )
            rejected += not stopped
            interval, margin = self.found[index].interval, self._rules.margin
            # With a difference, the whole interval that is printed for it must be within the margin.
            within = alone if stopped else alone / 2
            self.found[index] = dataclasses.replace(
                self.found[index],
                different=not stopped,
                alpha=alone,
                equivalent=bool(margin and interval and interval.is_within(margin, within)),
            )


def _p(judgement: Judgement) -> float:
    """The p-value of an arm; one without an interval comes last."""
    return judgement.interval.p if judgement.interval else 2.0


def _with_extras(trial: Trial, judgement: Judgement, rules: Rules) -> Judgement:
    """Add the next look, and the evidence of seeds that no look has planned."""
    if not rules.looks:
        return judgement
    after = [look for look in rules.looks if look > (judgement.look or 0)]
    waiting = after[0] if after and not judgement.settled else None
    planned = set(rules.seeds[: judgement.look or 0])
    extra = len(trial.differences.keys() - planned)
    e = None
    if (
        judgement.look is not None
        and extra
        and trial.testable_with(None)
        and len(trial.differences) > 1
    ):
        e = e_value(list(trial.differences.values()))
    return dataclasses.replace(judgement, next_look=waiting, extra_seeds=extra, e=e)
