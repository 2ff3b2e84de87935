"""Whether one recipe is better than another, by how much, and whether they may be compared: as types.

Two questions are separate: whether two trained models differ on stories like these (paired by
story, the runs as they are), and whether one recipe is better than the other (paired by seed: the
same initial weights and data order in both arms). The verdict answers the second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from storylab.experiments.family import Judgement
from storylab.experiments.statistics import Interval
from storylab.record.run import Run

BETTER, WORSE, EQUIVALENT, UNDECIDED = "better", "worse", "equivalent", "undecided"
BETTER_WITHIN = "better by less than the margin"
WORSE_WITHIN = "worse by less than the margin"
DIVERGED, CONFOUNDED = "diverged", "confounded"
# Of one cell of a factorial experiment, whose verdicts are those of its effects.
NOT_JUDGED = "not judged by itself"
# Exit codes of --exit_code: the higher, the further from better.
EXIT_CODES = {
    BETTER: 0,
    BETTER_WITHIN: 0,
    EQUIVALENT: 10,
    UNDECIDED: 11,
    NOT_JUDGED: 11,
    WORSE: 12,
    WORSE_WITHIN: 12,
    DIVERGED: 13,
    CONFOUNDED: 14,
}
# Verdicts of fewer seeds than this are called preliminary: their error is above 5 % where arms are
# unlike in their noise (docs/statistics.md).
FEW_SEEDS = 5


def exit_code(verdicts: Iterable[str]) -> int:
    """The code that says the verdicts of several arms: the highest; 0 for no arms."""
    return max((EXIT_CODES[verdict] for verdict in verdicts), default=0)


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

    @property
    def diverged(self) -> int:
        """Number of runs that diverged."""
        return sum(run.state == DIVERGED for run in self.runs)

    @property
    def ended(self) -> int:
        """Number of runs that finished or diverged."""
        return len(self.finished) + self.diverged


@dataclass(frozen=True)
class Ratio:
    """A paired ratio arm / baseline, geometric mean over seeds, with its 95 % interval.

    The interval is None for fewer than three pairs, which say too little of their spread.
    """

    value: float
    low: float | None
    high: float | None
    pairs: int


@dataclass(frozen=True)
class Noise:
    """Mean and spread of the final loss over seeds of one recipe."""

    mean: float
    standard_deviation: float
    seeds: int


@dataclass(frozen=True)
class EqualTime:
    """Difference of validation loss after the total training seconds of the faster arm.

    Read off both curves, of the estimate on a few fixed windows: ``progress`` is the share of its
    schedule that the slower arm had done by then, so its learning rate had not come down as far.
    """

    difference: float
    interval: Interval | None
    """None for one pair."""
    progress: float
    slower: str


@dataclass(frozen=True)
class Reach:
    """By how much less of something an arm needs for the loss at which the worse of the two ends.

    The ratio baseline / arm: above 1, the arm needs less. Read off the curves of the estimates.
    """

    tokens: Ratio
    seconds: Ratio | None
    """None where the runs' speeds are not comparable."""
    flops: Ratio


def judged_word(j: Judgement) -> str:
    """The verdict of a judgement, of losses that may be compared."""
    if j.interval is None or not j.different:
        return EQUIVALENT if j.equivalent else UNDECIDED
    if j.interval.estimate < 0:
        return BETTER_WITHIN if j.equivalent else BETTER
    return WORSE_WITHIN if j.equivalent else WORSE


def judged_ends(j: Judgement) -> tuple[float, float] | None:
    """The interval that belongs to the verdict of a judgement; None where there is none or the sign alone
    is settled."""
    if j.ends is None:
        return None
    if judged_word(j) == EQUIVALENT:
        return j.equivalence_ends
    return None if j.different and j.ends[0] <= 0 <= j.ends[1] else j.ends


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
    judgement: Judgement
    stories: Interval | None
    noise: Noise | None
    correlation: float | None
    """Of the two arms' losses over the paired seeds: what pairing removes."""
    speed: Ratio | None
    memory: Ratio | None
    energy: Ratio | None
    equal_time: EqualTime | None
    reach: Reach | None
    failures: tuple[str, ...]
    diverged: tuple[int, int] = (0, 0)
    """Runs that diverged, of the arm and of the baseline."""
    ended: tuple[int, int] = (0, 0)
    """Runs that finished or diverged, of the arm and of the baseline."""
    seeds: tuple[int, ...] = ()
    """Seeds of the arm's runs that are compared."""
    baseline_seeds: tuple[int, ...] = ()
    """Those of the baseline's runs; the same where they are paired."""
    exploratory: tuple[str, ...] = ()
    """Why the verdict is exploratory: no plan was registered, or it was changed later."""
    recovered: tuple[str, ...] = ()
    """Sides with runs that skipped steps or went back where they would have diverged, in words."""

    @property
    def recipes(self) -> Interval | None:
        """The difference between the recipes, with the error that the verdict uses."""
        return self.judgement.interval

    @property
    def verdict(self) -> str:
        """One of the words above; it mirrors when arm and baseline are exchanged."""
        if self.confounds:
            return CONFOUNDED
        # The runs that are left are a biased choice: those that happened not to diverge.
        if any(self.diverged):
            return DIVERGED
        return NOT_JUDGED if self.judgement.described else judged_word(self.judgement)

    @property
    def ends(self) -> tuple[float, float] | None:
        """The interval that belongs to the verdict, for all arms together; None where nothing is compared
        or the sign alone is settled."""
        if self.verdict in (CONFOUNDED, DIVERGED):
            return None
        return judged_ends(self.judgement)

    @property
    def settled(self) -> bool:
        """Whether more seeds are of no use to the verdict."""
        if self.verdict == DIVERGED:
            return any(d == n > 1 for d, n in zip(self.diverged, self.ended, strict=True))
        return self.verdict not in (UNDECIDED, CONFOUNDED, NOT_JUDGED)

    @property
    def preliminary(self) -> bool:
        """Whether the verdict rests on few seeds."""
        return self.recipes is not None and self.recipes.n < FEW_SEEDS

    @property
    def over_both(self) -> Interval | None:
        """The difference for new seeds and new stories together."""
        r = self.recipes
        if r is None or self.stories is None:
            return None
        of_seeds, of_stories = r.standard_error**2, self.stories.standard_error**2
        total = of_seeds + of_stories
        # Degrees of freedom of a sum of variances (Satterthwaite 1946, doi 10.2307/3002019).
        terms = of_seeds**2 / r.df + of_stories**2 / self.stories.df
        df = total**2 / terms if terms else r.df
        both = Interval(r.estimate, total**0.5, df, r.n)
        # More degrees of freedom can make it narrower than that of the seeds alone, which cannot be.
        return both if both.low < r.low else r
