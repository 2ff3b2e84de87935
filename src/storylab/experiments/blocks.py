"""Compute the effects of a factorial experiment from its runs.

Every seed is a block: an effect is a weighted sum of the losses of all cells of one seed, so that whatever
the seed adds to all of them drops out. These sums are judged over the seeds like the differences of
arms, and together: looks, Holm's method, moderated variances and the margin are those of
:mod:`storylab.experiments.family`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from storylab.experiments.comparison import BETTER, WORSE, Arm, Ratio
from storylab.experiments.confounds import recovery_notes
from storylab.experiments.contest import Contest
from storylab.experiments.curve_comparison import ratio_of
from storylab.experiments.effects import EffectResult, SimpleEffect, contrasts, trial_of
from storylab.experiments.factorial import Effect, Factorial
from storylab.experiments.family import Judgement, Rules, judge
from storylab.experiments.statistics import Interval
from storylab.record.run import DIVERGED, Run


@dataclass(frozen=True)
class Block:
    """The cells of a factorial experiment under one condition.

    Attributes:
        condition: its name.
        arms: the cells with their runs, in the order of the design.
        confounds: everything but the factors in which the cells differ.
        speeds: whether the runs' speeds can be compared.
        void: seeds with which no loss may be compared: they are confounded, or a run diverged.
    """

    condition: str
    arms: tuple[Arm, ...]
    confounds: tuple[str, ...]
    speeds: bool
    void: frozenset[int]

    def by_seed(self) -> dict[int, list[Run | None]]:
        """The finished run of every cell, or None, by seed."""
        seeds = dict.fromkeys(run.config.seed for arm in self.arms for run in arm.runs)
        finished = [{run.config.seed: run for run in arm.finished} for arm in self.arms]
        return {seed: [of_cell.get(seed) for of_cell in finished] for seed in seeds}

    def ended(self) -> frozenset[int]:
        """Seeds whose runs have ended in every cell."""
        ended = [
            {run.config.seed for run in arm.runs if run.state != "unfinished"} for arm in self.arms
        ]
        return frozenset(set.intersection(*ended))

    def diverged(self, seeds: Collection[int]) -> tuple[str, ...]:
        """Cells in which a run with one of ``seeds`` diverged."""
        return tuple(
            arm.name for arm in self.arms if not self._diverged_seeds(arm).isdisjoint(seeds)
        )

    def confounded(self, seeds: Collection[int]) -> tuple[str, ...]:
        """The confounds, if the losses with one of ``seeds`` are void although no run diverged."""
        void = self.void.intersection(seeds)
        return self.confounds if void.difference(*map(self._diverged_seeds, self.arms)) else ()

    @staticmethod
    def _diverged_seeds(arm: Arm) -> frozenset[int]:
        return frozenset(run.config.seed for run in arm.runs if run.state == DIVERGED)

    @property
    def lost(self) -> bool:
        """Whether a cell diverged with every seed, of at least two."""
        return any(arm.diverged == arm.ended > 1 for arm in self.arms)


def block_of(condition: str, arms: Sequence[Arm], contests: Iterable[Contest]) -> Block:
    """The cells of a condition; ``contests`` with the baseline say whether they may be compared."""
    contests = list(contests)
    confounds = dict.fromkeys(text for contest in contests for text in contest.confounds)
    speeds = not any(contest.speed_confounds for contest in contests)
    void = frozenset(seed for contest in contests for seed in contest.trial.void)
    return Block(condition, tuple(arms), tuple(confounds), speeds, void)


def whole_seeds(runs: Mapping[int, Sequence[Run | None]]) -> dict[int, list[Run]]:
    """The seeds that finished in every cell."""
    return {
        seed: [run for run in cells if run is not None]
        for seed, cells in runs.items()
        if all(run is not None for run in cells)
    }


def effects_of(
    factorial: Factorial,
    blocks: Sequence[Block],
    rules: Rules,
    exploratory: tuple[str, ...] = (),
) -> list[EffectResult]:
    """All effects under every condition, judged together.

    Args:
        factorial: the design.
        blocks: its cells under every condition.
        rules: how to judge; a seed that lacks a loss in a cell is left out.
        exploratory: why the verdicts are exploratory.
    """
    cases = [(block, effect) for block in blocks for effect in factorial.effects]
    whole = {block.condition: whole_seeds(block.by_seed()) for block in blocks}
    trials = [
        trial_of(
            effect,
            factorial.cells,
            {seed: [r.loss for r in runs] for seed, runs in whole[block.condition].items()},
            block.condition,
            block.ended(),
            block.void,
        )
        for block, effect in cases
    ]
    judgements = judge(trials, dataclasses.replace(rules, shared_baseline=False))
    found = []
    for (block, effect), judgement in zip(cases, judgements, strict=True):
        result = _result(factorial, block, effect, judgement, rules, whole[block.condition])
        found.append(dataclasses.replace(result, exploratory=exploratory))
    return [_with_interactions(result, found, factorial) for result in found]


def _result(
    factorial: Factorial,
    block: Block,
    effect: Effect,
    judgement: Judgement,
    rules: Rules,
    whole: Mapping[int, Sequence[Run]],
) -> EffectResult:
    seeds = set(rules.seeds[: judgement.look]) if judgement.look is not None else block.ended()
    used = {seed: runs for seed, runs in whole.items() if seed in seeds}
    main = len(effect.factors) == 1
    factor = factorial.factors[effect.factors[0]]
    return EffectResult(
        effect=effect,
        name=factorial.effect_name(effect.factors),
        condition=block.condition,
        change=f"{factor.levels[1]} vs {factor.levels[0]}" if main else "",
        aliases=tuple(factorial.effect_name(other) for other in effect.aliases),
        judgement=judgement,
        confounds=block.confounded(seeds),
        diverged=block.diverged(seeds),
        lost=block.lost,
        left_out=tuple(_left_out(block)),
        recovered=tuple(recovery_notes(block.arms, used)),
        simple=() if main else _simple(factorial, effect, judgement, used),
        speed=_speed(factorial, effect, used) if main and block.speeds else None,
    )


def _left_out(block: Block) -> list[str]:
    texts = []
    ended = block.ended()
    for seed, runs in sorted(block.by_seed().items()):
        if seed not in ended:
            continue
        cells = [arm.name for arm, run in zip(block.arms, runs, strict=True) if run is None]
        if cells:
            more = f" and {len(cells) - 1} more cells" if len(cells) > 1 else ""
            texts.append(f"seed {seed}: no loss of {cells[0]}{more}")
    return texts


def _simple(
    factorial: Factorial, effect: Effect, judgement: Judgement, used: Mapping[int, Sequence[Run]]
) -> tuple[SimpleEffect, ...]:
    """Each factor of an interaction at each level of the other, with the error that the interaction has."""
    interval = judgement.interval
    if interval is None or not used:
        return ()
    losses = np.array([[run.loss for run in runs] for runs in used.values()]).mean(axis=0)
    both = float(contrasts(effect, factorial.cells, losses))
    found = []
    for this, other in (effect.factors, effect.factors[::-1]):
        main = float(contrasts(Effect((this,)), factorial.cells, losses))
        factor, held = factorial.factors[this], factorial.factors[other]
        for level, name in enumerate(held.levels):
            estimate = main + (both / 2 if level else -both / 2)
            found.append(
                SimpleEffect(
                    change=f"{factor.name} ({factor.levels[1]} vs {factor.levels[0]})",
                    held=f"{held.name}={name}",
                    # Half of the weights of the interaction: half of its variance.
                    interval=Interval(
                        estimate, interval.standard_error / math.sqrt(2), interval.df, interval.n
                    ),
                )
            )
    return tuple(found)


def _speed(factorial: Factorial, effect: Effect, used: Mapping[int, Sequence[Run]]) -> Ratio | None:
    """Tokens a second at the second level over those at the first, each a geometric mean over cells."""
    pairs: list[tuple[float | None, float | None]] = []
    for runs in used.values():
        speeds = [run.speed for run in runs]
        if not all(speeds):
            return None
        logs = np.log(np.array(speeds, float))
        pairs.append((math.exp(float(contrasts(effect, factorial.cells, logs))), 1.0))
    return ratio_of(pairs) if pairs else None


def _with_interactions(
    result: EffectResult, every: Sequence[EffectResult], factorial: Factorial
) -> EffectResult:
    """A main effect with the names of the factors that are shown to change it."""
    if result.is_interaction:
        return result
    (this,) = result.effect.factors
    others = [
        factorial.factors[index].name
        for other in every
        if other.is_interaction
        and other.condition == result.condition
        and other.word in (BETTER, WORSE)
        and this in other.effect.factors
        for index in other.effect.factors
        if index != this
    ]
    return dataclasses.replace(result, interacts_with=tuple(others))
