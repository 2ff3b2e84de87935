"""Decide whether one recipe is better than another, by how much, and whether they may be compared.

Two questions are separate: whether two trained models differ on stories like these (paired by
story, the runs as they are), and whether one recipe is better than the other (paired by seed: the
same initial weights and data order in both arms). The verdict answers the second.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from storylab.experiments import statistics
from storylab.experiments.statistics import ALPHA, Interval
from storylab.record.run import Run

BETTER, WORSE, EQUIVALENT = "better", "worse", "equivalent"
NO_DIFFERENCE, CANT_TELL, CONFOUNDED = "no difference seen", "can't tell", "confounded"
DIVERGED = "diverged"


@dataclass(frozen=True)
class Arm:
    """A recipe and its runs, one for each seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that were trained to their end."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def losses(self) -> list[float]:
        """Final validation losses of the finished runs."""
        return [run.loss for run in self.finished]


@dataclass(frozen=True)
class Ratio:
    """A paired ratio arm / baseline, geometric mean over seeds, with its 95 % interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Noise:
    """Spread of the final loss over seeds of one recipe."""

    standard_deviation: float
    seeds: int


@dataclass(frozen=True)
class EqualTime:
    """Difference of validation loss after the total training seconds of the faster arm.

    Read off both curves, of the estimate on a few fixed windows: ``progress`` is the share of its
    schedule that the slower arm had done by then, so its learning rate had not come down as far.
    """

    difference: float
    low: float | None
    high: float | None
    progress: float
    slower: str


@dataclass(frozen=True)
class Comparison:
    """An arm compared with its baseline. Losses in nats, arm minus baseline."""

    arm: str
    baseline: str
    condition: str
    confounds: tuple[str, ...]
    speed_confounds: tuple[str, ...]
    notes: tuple[str, ...]
    pairs: int
    paired: bool
    recipes: Interval | None
    from_noise: bool
    stories: Interval | None
    noise: Noise | None
    margin: float | None
    speed: Ratio | None
    memory: Ratio | None
    energy: Ratio | None
    equal_time: EqualTime | None
    failures: tuple[str, ...]
    diverged: int = 0
    """Runs of the arm that diverged."""
    baseline_diverged: int = 0
    adjusted_p: float | None = None
    adjusted_equivalence_p: float | None = None
    family: int = 1

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``equivalent``, ``no difference seen``, ``can't tell``,
        ``diverged`` or ``confounded``; corrected for the number of comparisons made together."""
        if self.confounds:
            return CONFOUNDED
        # The runs that are left are a biased choice: those that happened not to diverge.
        if self.diverged and not self.baseline_diverged:
            return DIVERGED
        if self.baseline_diverged:
            return CANT_TELL
        if self.recipes is None or self.adjusted_p is None:
            return CANT_TELL
        equivalence = self.adjusted_equivalence_p
        if equivalence is not None and equivalence < ALPHA:
            return EQUIVALENT
        if self.adjusted_p < ALPHA:
            return BETTER if self.recipes.estimate < 0 else WORSE
        # A difference that fails only because of the correction is no proof of equality either.
        return CANT_TELL if self.recipes.p < ALPHA else NO_DIFFERENCE

    @property
    def spread(self) -> float | None:
        """Standard deviation of the paired differences between seeds."""
        if self.recipes is None:
            return math.sqrt(2) * self.noise.standard_deviation if self.noise else None
        return self.recipes.standard_error * math.sqrt(self.recipes.n)

    @property
    def alpha(self) -> float:
        """Level that a single comparison must reach at worst, for the number made together."""
        return ALPHA / self.family

    @property
    def detectable(self) -> float | None:
        """The true difference that this many pairs would find with a chance of 80 %."""
        if self.recipes is None or self.spread is None:
            return None
        if self.recipes.n < 2:
            return statistics.detectable_by_noise(self.recipes, self.alpha)
        return statistics.detectable_difference(self.spread, self.recipes.n, self.alpha)

    @property
    def seeds_needed(self) -> int | None:
        """Pairs that would find a difference as large as the one seen, with a chance of 80 %."""
        if self.spread is None:
            return None
        difference = self.recipes.estimate if self.recipes else None
        if difference is None and self.stories is not None:
            difference = self.stories.estimate
        if not difference:
            return None
        return statistics.seeds_needed(difference, self.spread, self.alpha)


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with p-values corrected for their number, by Holm's method."""
    tested = [c for c in comparisons if c.recipes is not None and not c.confounds]
    ps = statistics.holm([c.recipes.p for c in tested if c.recipes])
    equal = [c for c in tested if c.margin is not None]
    equivalences = statistics.holm(
        [c.recipes.equivalence_p(c.margin) for c in equal if c.recipes and c.margin]
    )
    by_id = {
        id(c): {"adjusted_p": p, "family": len(tested)} for c, p in zip(tested, ps, strict=True)
    }
    for c, p in zip(equal, equivalences, strict=True):
        by_id[id(c)]["adjusted_equivalence_p"] = p
    nothing: dict[str, Any] = {}
    return [dataclasses.replace(c, **by_id.get(id(c), nothing)) for c in comparisons]
