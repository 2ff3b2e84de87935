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
        other: an interval that is not of paired differences, of arms without enough pairs.
        testable: whether a loss may be compared: nothing confounds it and no run diverged.
        scale: the standard deviation of its differences is expected to be this many times that of a trial
            of scale 1.
    """

    group: str
    differences: Mapping[int, float]
    ended: frozenset[int]
    other: Interval | None = None
    testable: bool = True
    scale: float = 1.0


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
    family = max(1, sum(trial.testable for trial in trials))
    blank = Judgement(family=family, alpha=ALPHA / family, margin=rules.margin)
    found = [blank] * len(trials)
    for number, look in enumerate(rules.looks or (None,)):
        seeds = rules.seeds[:look] if look is not None else None
        open_now = {
            index
            for index, trial in enumerate(trials)
            if trial.testable
            and not found[index].settled
            and (seeds is None or trial.ended.issuperset(seeds))
        }
        used = {
            index: _used(trials[index], found[index], rules, seeds if index in open_now else None)
            for index in range(len(trials))
            if trials[index].testable
        }
        if open_now:
            _judge_look(trials, rules, number, open_now, used, found)
    return [_with_extras(trial, j, rules) for trial, j in zip(trials, found, strict=True)]


def describe(trials: Sequence[Trial], rules: Rules) -> list[Judgement]:
    """The 95 % interval of every trial alone, by all of its seeds, without a verdict."""
    every = dataclasses.replace(rules, looks=(), margin=None)
    return [
        dataclasses.replace(j, family=1, alpha=ALPHA, different=False, described=True)
        for j in judge(trials, every)
    ]


def _used(
    trial: Trial, judgement: Judgement, rules: Rules, seeds: Sequence[int] | None
) -> list[float]:
    """Differences that count now: of a look's seeds, or, of an arm that is not judged at it, those of its
    own last look."""
    if seeds is None and rules.looks:
        seeds = rules.seeds[: judgement.look or 0]
    if seeds is None:
        return list(trial.differences.values())
    return [trial.differences[seed] for seed in seeds if seed in trial.differences]


def _judge_look(
    trials: Sequence[Trial],
    rules: Rules,
    number: int,
    open_now: Set[int],
    used: Mapping[int, list[float]],
    found: list[Judgement],
) -> None:
    """Judge at one look the arms that have reached it, and replace their entries of ``found``."""
    looks = rules.looks or (1,)
    family = found[0].family
    measured: dict[int, Judgement] = {}
    for group in dict.fromkeys(trial.group for trial in trials):
        # One pooled variance needs arms with the same seeds: those that are judged now.
        members = [
            i
            for i in used
            if trials[i].group == group
            and len(used[i]) > 1
            and (i in open_now or rules.variance != "pooled")
        ]
        values, variance = intervals(
            [[value / trials[i].scale for value in used[i]] for i in members],
            rules.variance,
            rules.shared_baseline,
        )
        known = {
            i: value.scaled(trials[i].scale) if value else None
            for i, value in zip(members, values, strict=True)
        }
        for index in open_now:
            if trials[index].group == group:
                interval = known.get(index) or trials[index].other
                measured[index] = dataclasses.replace(
                    found[index],
                    interval=interval,
                    look=rules.looks[number] if rules.looks else None,
                    variance=variance if index in known else "own",
                )
    rejected = sum(j.different for j in found)
    order = sorted(measured, key=lambda i: p if (p := _p(measured[i])) is not None else 2.0)
    stopped = False
    for index in order:
        judgement = measured[index]
        level = (
            look_levels(looks, ALPHA / (family - rejected))[number] if rejected < family else ALPHA
        )
        p = _p(judgement)
        stopped = stopped or p is None or not p < level
        rejected += not stopped
        alone = look_levels(looks, ALPHA / family)[number]
        margin, interval = rules.margin, judgement.interval
        found[index] = dataclasses.replace(
            judgement,
            different=not stopped,
            alpha=alone,
            equivalent=bool(margin and interval and interval.is_within(margin, alone)),
        )


def _p(judgement: Judgement) -> float | None:
    return judgement.interval.p if judgement.interval else None


def _with_extras(trial: Trial, judgement: Judgement, rules: Rules) -> Judgement:
    """Add the next look, and the evidence of seeds that no look has planned."""
    if not rules.looks:
        return judgement
    after = [look for look in rules.looks if look > (judgement.look or 0)]
    waiting = after[0] if after and not judgement.settled else None
    planned = set(rules.seeds[: judgement.look or 0])
    extra = len(trial.differences.keys() - planned)
    e = None
    if judgement.look is not None and extra and trial.testable and len(trial.differences) > 1:
        e = e_value(list(trial.differences.values()))
    return dataclasses.replace(judgement, next_look=waiting, extra_seeds=extra, e=e)
