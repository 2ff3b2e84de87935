"""Compare arms with their baselines: judge them together, and compute the intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from storylab.experiments import statistics
from storylab.experiments.comparison import Arm, Comparison, Noise
from storylab.experiments.confounds import comparison_notes, recovery_notes
from storylab.experiments.contest import Contest
from storylab.experiments.curve_comparison import equal_time, ratio_of, reach
from storylab.experiments.factors import changed_fields, infer_factor
from storylab.experiments.family import Judgement, Rules, describe, judge
from storylab.experiments.noise import same_recipe
from storylab.experiments.statistics import Interval
from storylab.record.index import RunCache
from storylab.record.run import Run


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
        recovered=tuple(recovery_notes((arm, baseline))),
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
