"""The effects of a factorial experiment as types: of each factor on the loss, and of pairs that interact.

A main effect is the mean loss at the second level minus that at the first, over all levels of the other
factors. An interaction is a difference of differences: how much more the first factor changes the loss at
the second level of the other one than at its first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from storylab.experiments.comparison import (
    BETTER,
    BETTER_WITHIN,
    CONFOUNDED,
    DIVERGED,
    EQUIVALENT,
    FEW_SEEDS,
    WORSE,
    WORSE_WITHIN,
    Comparison,
    Ratio,
    judged_ends,
    judged_word,
)
from storylab.experiments.factorial import Effect, Levels
from storylab.experiments.factors import qualified_name
from storylab.experiments.family import Judgement, Trial
from storylab.experiments.statistics import Interval

INTERACT, INTERACT_WITHIN = "interact", "interact by less than the margin"
NO_INTERACTION = "no interaction within the margin"
INTERACTION_WORDS = {
    BETTER: INTERACT,
    WORSE: INTERACT,
    BETTER_WITHIN: INTERACT_WITHIN,
    WORSE_WITHIN: INTERACT_WITHIN,
    EQUIVALENT: NO_INTERACTION,
}


@dataclass(frozen=True)
class SimpleEffect:
    """The effect of one factor while another stays at a level.

    Attributes:
        change: ``on vs off`` of the factor, with its name.
        held: the other factor and its level.
        interval: of the difference in nats, 95 % alone.
    """

    change: str
    held: str
    interval: Interval


@dataclass(frozen=True)
class EffectResult:
    """A main effect or an interaction under a condition, judged. Losses in nats."""

    effect: Effect
    name: str
    condition: str
    change: str
    """``on vs off`` for a main effect, empty for an interaction."""
    aliases: tuple[str, ...]
    """Effects that this one cannot be separated from."""
    judgement: Judgement
    confounds: tuple[str, ...]
    diverged: tuple[str, ...]
    """Cells in which a run diverged."""
    lost: bool
    """Whether a cell diverged with every seed, so that more seeds are of no use."""
    left_out: tuple[str, ...]
    """Seeds without a loss in every cell, with the cells that lack it."""
    recovered: tuple[str, ...]
    """Cells with runs that would have diverged without their ``on_divergence``."""
    simple: tuple[SimpleEffect, ...]
    """Of an interaction: each factor at each level of the other."""
    speed: Ratio | None
    """Of a main effect: the second level's tokens a second over the first's."""
    interacts_with: tuple[str, ...] = ()
    """Of a main effect: the factors that change it."""
    exploratory: tuple[str, ...] = ()

    @property
    def is_interaction(self) -> bool:
        """Whether it is the interaction of two factors."""
        return len(self.effect.factors) > 1

    @property
    def word(self) -> str:
        """The verdict in the words of a comparison."""
        if self.confounds:
            return CONFOUNDED
        return DIVERGED if self.diverged else judged_word(self.judgement)

    @property
    def verdict(self) -> str:
        """The verdict in the words of its kind."""
        return INTERACTION_WORDS.get(self.word, self.word) if self.is_interaction else self.word

    @property
    def ends(self) -> tuple[float, float] | None:
        """The interval that belongs to the verdict; see :attr:`Comparison.ends`."""
        return None if self.word in (CONFOUNDED, DIVERGED) else judged_ends(self.judgement)

    @property
    def settled(self) -> bool:
        """Whether more seeds are of no use to the verdict."""
        return self.lost or (not self.confounds and not self.diverged and self.judgement.settled)

    @property
    def preliminary(self) -> bool:
        """Whether the verdict rests on few seeds."""
        interval = self.judgement.interval
        return interval is not None and interval.n < FEW_SEEDS


def contrasts(effect: Effect, cells: Sequence[Levels], losses: np.ndarray) -> np.ndarray:
    """The effect by seed in nats, ``[seeds]``, of ``losses [cells, seeds]``."""
    found: np.ndarray = effect.weights(cells) @ np.asarray(losses, float)
    return found


def trial_of(
    effect: Effect,
    cells: Sequence[Levels],
    losses: Mapping[int, Sequence[float]],
    group: str = "",
    ended: frozenset[int] | None = None,
    void: frozenset[int] = frozenset(),
) -> Trial:
    """The facts of an effect that a judgement needs.

    Args:
        effect: main effect or interaction.
        cells: the design.
        losses: of every cell, by seed.
        group: the condition.
        ended: seeds that have ended in every cell; by default those of ``losses``.
        void: seeds with which losses may not be compared.
    """
    weights = effect.weights(cells)
    differences = {seed: float(weights @ np.asarray(v, float)) for seed, v in losses.items()}
    if ended is None:
        ended = frozenset(losses)
    return Trial(group, differences, ended, void=void, scale=effect.scale)


def verdicts_of(comparisons: Iterable[Comparison], effects: Sequence[EffectResult]) -> list[str]:
    """The verdicts that say whether something is better or worse: of the main effects of a factorial
    experiment, or of every arm."""
    if effects:
        return [effect.verdict for effect in effects if not effect.is_interaction]
    return [comparison.verdict for comparison in comparisons]


def effect_title(result: EffectResult) -> str:
    """Name and condition of an effect, with the levels of a main effect."""
    change = f" ({result.change})" if result.change else ""
    return qualified_name(f"{result.name}{change}", result.condition)
