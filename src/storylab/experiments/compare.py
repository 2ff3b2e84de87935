"""Compare runs: pair them, find what confounds them, and compute the intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from storylab.experiments import statistics
from storylab.experiments.comparison import DIVERGED, Arm, Comparison, Noise
from storylab.experiments.confounds import comparison_notes, loss_confounds, speed_confounds
from storylab.experiments.curve_comparison import equal_time, ratio_of, reach
from storylab.experiments.factors import changed_fields, infer_factor
from storylab.experiments.family import Judgement, Rules, Trial, describe, judge
from storylab.experiments.noise import noise_floor, noise_of, same_recipe
from storylab.experiments.statistics import Interval
from storylab.record.index import RunCache
from storylab.record.run import Run

# Correlation of two near arms' losses over seeds, measured over 22 pairs of arms (docs/statistics.md): it
# decides, before any loss is seen, whether few shared seeds are better than all seeds unpaired.
EXPECTED_CORRELATION = 0.87


@dataclass(frozen=True)
class Contest:
    """An arm against a baseline.

    Args:
        arm: its runs.
        baseline: the arm to compare with.
        allowed: config fields in which the two may differ: the factor's.
        condition: under which condition both were run, for the report.
        noise: spread over seeds of the baseline's recipe; by default that of the baseline's runs;
            for a single run, that of the other seeds in its folder.
        cache: runs that have been read already.
    """

    arm: Arm
    baseline: Arm
    allowed: frozenset[str]
    condition: str = ""
    noise: Noise | None = None
    cache: RunCache | None = None

    def of_seeds(self, seeds: Collection[int]) -> Contest:
        """The contest with the runs of these seeds alone."""
        arm, baseline = (
            Arm(side.name, tuple(run for run in side.runs if run.config.seed in seeds))
            for side in (self.arm, self.baseline)
        )
        return dataclasses.replace(self, arm=arm, baseline=baseline)

    @cached_property
    def pairs(self) -> list[tuple[Run, Run]]:
        """Finished runs of the two with the same seeds."""
        ours = {run.seeds: run for run in self.arm.finished}
        theirs = {run.seeds: run for run in self.baseline.finished}
        return [(ours[seeds], theirs[seeds]) for seeds in ours if seeds in theirs]

    @cached_property
    def paired(self) -> bool:
        """Whether the runs are compared by seed; a design that is chosen before any loss is seen."""
        shared, sizes = len(self.pairs), [len(s.finished) for s in (self.arm, self.baseline)]
        if shared == min(sizes) or min(sizes) < 2:
            return shared > 0
        if shared < 2:
            return False
        by_seed = stats.t.isf(0.025, shared - 1) * math.sqrt(
            2 * (1 - EXPECTED_CORRELATION) / shared
        )
        of_all = stats.t.isf(0.025, sum(sizes) - 2) * math.sqrt(sum(1 / n for n in sizes))
        return bool(by_seed <= of_all)

    @cached_property
    def met(self) -> list[tuple[Run, Run]]:
        """The pairs; where runs are not paired, every run of one arm with every run of the other."""
        if self.paired:
            return self.pairs
        return [(a, b) for a in self.arm.finished for b in self.baseline.finished]

    @cached_property
    def confounds(self) -> tuple[str, ...]:
        """Everything but the factor in which the arms differ and that can move the loss."""
        found = (c for pair in self.met for c in loss_confounds(*pair, self.allowed, self.paired))
        return tuple(dict.fromkeys(found))

    @cached_property
    def speed_confounds(self) -> tuple[str, ...]:
        """Everything but the factor in which the arms differ and that can move their speed."""
        return tuple(dict.fromkeys(c for pair in self.met for c in speed_confounds(*pair)))

    @cached_property
    def known_noise(self) -> Noise | None:
        """The noise that was given, or that of the baseline's runs, or of the other seeds in the folder
        of a single one."""
        found = self.noise or noise_of(self.baseline.finished)
        if found is None and self.baseline.finished:
            found = noise_floor(self.baseline.finished[0], self.cache)
        return found

    @property
    def trial(self) -> Trial:
        """The facts that a judgement needs."""
        differences = {a.config.seed: a.loss - b.loss for a, b in self.pairs} if self.paired else {}
        ended = [
            {run.config.seed for run in side.runs if run.state != "unfinished"}
            for side in (self.arm, self.baseline)
        ]
        return Trial(
            group=self.condition,
            differences=differences,
            ended=frozenset(ended[0] & ended[1]),
            other=None if len(differences) > 1 else self._other_interval(),
            void=self._void,
        )

    @property
    def _void(self) -> frozenset[int]:
        """Seeds whose losses may not be compared: they are confounded, or a run diverged."""
        found = {
            run.config.seed
            for side in (self.arm, self.baseline)
            for run in side.runs
            if run.state == DIVERGED
        }
        for a, b in self.met:
            if any(loss_confounds(a, b, self.allowed, self.paired)):
                found |= {a.config.seed, b.config.seed}
        return frozenset(found)

    def _other_interval(self) -> Interval | None:
        """The interval of arms without two pairs: unpaired, or from the noise of one of the recipes."""
        ours, theirs = self.arm.losses, self.baseline.losses
        if min(len(ours), len(theirs)) > 1:
            return statistics.unpaired_interval(ours, theirs)
        if not ours or not theirs:
            return None
        known = [
            noise_of(self.arm.finished) or noise_floor(self.arm.finished[0], self.cache),
            self.known_noise,
        ]
        # Where the noise of one recipe alone is known, the other is taken to be as noisy.
        noises = [noise for noise in known if noise]
        if not noises:
            return None
        return statistics.single_interval(
            float(np.mean(ours)) - float(np.mean(theirs)),
            [
                (n.standard_deviation, n.seeds)
                for n in (known[0] or noises[0], known[1] or noises[0])
            ],
            (len(ours), len(theirs)),
            shared=len(noises) == 1,
        )


def compare_contests(
    contests: Sequence[Contest], rules: Rules, judged: bool = True
) -> list[Comparison]:
    """Compare arms with their baselines, judged together; or only described, if not ``judged``.

    Each is compared by the runs of the look that it is judged at; before its first look by all.
    """
    found_by = judge if judged else describe
    judgements = found_by([contest.trial for contest in contests], rules)
    found = []
    for contest, judgement in zip(contests, judgements, strict=True):
        if judgement.look is not None:
            contest = contest.of_seeds(rules.seeds[: judgement.look])
        found.append(_comparison(contest, judgement))
    return found


def compare_arms(
    arm: Arm,
    baseline: Arm,
    allowed: frozenset[str],
    condition: str = "",
    margin: float | None = None,
    noise: Noise | None = None,
    cache: RunCache | None = None,
) -> Comparison:
    """Compare ``arm`` with ``baseline`` alone; see :class:`Contest` and :class:`Rules`."""
    contest = Contest(arm, baseline, allowed, condition, noise, cache)
    return compare_contests([contest], Rules(margin=margin))[0]


def _comparison(contest: Contest, judgement: Judgement) -> Comparison:
    """The comparison with its judgement and all measurements."""
    arm, baseline, pairs = contest.arm, contest.baseline, contest.pairs
    of_speed = contest.speed_confounds
    # Without pairs, speeds and memory are still those of like runs: one by one, in order.
    both = pairs if contest.paired else list(zip(arm.finished, baseline.finished, strict=False))
    met = (
        ([a for a, _ in pairs], [b for _, b in pairs])
        if contest.paired
        else (arm.finished, baseline.finished)
    )
    return Comparison(
        arm=arm.name,
        baseline=baseline.name,
        condition=contest.condition,
        confounds=contest.confounds,
        speed_confounds=of_speed,
        notes=tuple(_notes(contest)),
        pairs=len(both),
        paired=contest.paired,
        judgement=judgement,
        stories=_story_interval(both) if not contest.confounds else None,
        noise=contest.known_noise,
        correlation=statistics.correlation([a.loss for a, _ in pairs], [b.loss for _, b in pairs]),
        speed=ratio_of([(a.speed, b.speed) for a, b in both]),
        memory=ratio_of([(a.training_memory, b.training_memory) for a, b in both]),
        energy=ratio_of([(a.results.energy_joules, b.results.energy_joules) for a, b in both]),
        equal_time=(
            equal_time(arm.name, baseline.name, pairs) if contest.paired and not of_speed else None
        ),
        reach=reach(pairs, not of_speed) if contest.paired and not contest.confounds else None,
        failures=tuple(_failures(arm, baseline)),
        diverged=(arm.diverged, baseline.diverged),
        ended=(arm.ended, baseline.ended),
        seeds=tuple(run.config.seed for run in met[0]),
        baseline_seeds=tuple(run.config.seed for run in met[1]),
    )


def _notes(contest: Contest) -> Iterable[str]:
    yield from comparison_notes(contest.arm, contest.baseline)
    shared = len(contest.pairs)
    if shared and not contest.paired:
        sizes = f"{len(contest.arm.finished)} and {len(contest.baseline.finished)}"
        yield (
            f"{shared} seeds are shared by arms of {sizes}: all runs are compared, as if they shared "
            "none, which is valid and narrower than the shared seeds alone are expected to be"
        )


def _failures(arm: Arm, baseline: Arm) -> Iterable[str]:
    for side in (arm, baseline):
        for run in side.runs:
            if not run.finished:
                reason = f" ({run.reason})" if run.reason else ""
                yield f"{side.name}, seed {run.config.seed}: {run.state}{reason}"


def group_runs(results: Iterable[Run]) -> list[Arm]:
    """Group runs of the same recipe and data into arms, in order of their first run."""
    groups: list[list[Run]] = []
    for result in results:
        for group in groups:
            if same_recipe(group[0], result):
                if result.seeds not in {run.seeds for run in group}:
                    group.append(result)
                break
        else:
            groups.append([result])
    return [Arm(_arm_name(group, groups[0]), tuple(group)) for group in groups]


def compare_runs(
    results: Sequence[Run], margin: float | None = None, cache: RunCache | None = None
) -> list[Comparison]:
    """Group ``results`` into arms and compare each with the first; a seed counts once.

    The difference between two arms is the factor if one factor covers it; else they are confounded.

    Args:
        results: the runs.
        margin: the largest difference in nats that counts as none; None for no test of equivalence.
        cache: runs that have been read already.
    """
    baseline, *arms = group_runs(results)
    contests = []
    for arm in arms:
        changed = set(changed_fields(baseline.runs[0].config, arm.runs[0].config))
        allowed = frozenset(changed) if infer_factor(changed) else frozenset()
        contests.append(Contest(arm, baseline, allowed, cache=cache))
    return compare_contests(contests, Rules(margin=margin))


def _arm_name(group: Sequence[Run], first: Sequence[Run]) -> str:
    """Name of an arm: the folder of its first run, and the difference of its config to the first
    group's."""
    changed = changed_fields(first[0].config, group[0].config)
    name = group[0].folder.name
    if not changed or len(changed) > 3:
        return name
    return f"{name} ({', '.join(f'{field} {value}' for field, (_, value) in changed.items())})"


def _story_interval(pairs: Sequence[tuple[Run, Run]]) -> Interval | None:
    """Paired by story: each story's loss is the mean over the runs of an arm."""
    if not pairs:
        return None
    arm = np.mean([a.story_losses[:, 0] for a, _ in pairs], axis=0)
    baseline = np.mean([b.story_losses[:, 0] for _, b in pairs], axis=0)
    return statistics.story_interval(arm, baseline, pairs[0][0].story_losses[:, 1])
