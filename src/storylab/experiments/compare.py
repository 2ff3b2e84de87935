"""Compare runs: pair them, find what confounds them, and compute the intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from storylab.experiments import statistics
from storylab.experiments.comparison import Arm, Comparison, EqualTime, Noise, Ratio, correct
from storylab.experiments.confounds import comparison_notes, loss_confounds, speed_confounds
from storylab.experiments.factors import (
    changed_fields,
    infer_factor,
)
from storylab.experiments.noise import noise_floor, noise_of, same_recipe
from storylab.experiments.statistics import Interval
from storylab.record.index import RunCache
from storylab.record.run import Run


def compare_arms(
    arm: Arm,
    baseline: Arm,
    allowed: frozenset[str],
    condition: str = "",
    margin: float | None = None,
    noise: Noise | None = None,
    cache: RunCache | None = None,
) -> Comparison:
    """Compare ``arm`` with ``baseline``.

    Args:
        arm: its runs; those of the baseline's seeds are paired.
        baseline: the arm to compare with.
        allowed: config fields in which the two may differ: the factor's.
        condition: under which condition both were run, for the report.
        margin: the largest difference in nats that counts as none; None for no test of equivalence.
        noise: spread over seeds of the baseline's recipe; by default that of the baseline's runs;
            for a single run, that of the other seeds in its folder.
        cache: runs that have been read already.
    """
    pairs, paired = _pair(arm, baseline)
    # Without pairs every run of one arm is compared with every run of the other.
    met = pairs if paired else [(a, b) for a in arm.finished for b in baseline.finished]
    confounds = dict.fromkeys(c for pair in met for c in loss_confounds(*pair, allowed, paired))
    of_speed = dict.fromkeys(c for pair in met for c in speed_confounds(*pair))
    noise = noise or _noise_of_baseline(baseline, cache)
    recipes = _recipe_interval(arm, baseline, pairs, paired)
    from_noise = recipes is None and noise is not None and len(pairs) == 1
    if from_noise and noise is not None:
        difference = pairs[0][0].loss - pairs[0][1].loss
        recipes = statistics.noise_interval(difference, noise.standard_deviation, noise.seeds - 1)
    comparison = Comparison(
        arm=arm.name,
        baseline=baseline.name,
        condition=condition,
        confounds=tuple(confounds),
        speed_confounds=tuple(of_speed),
        notes=tuple(comparison_notes(arm, baseline, pairs)),
        pairs=len(pairs),
        paired=paired,
        recipes=recipes,
        from_noise=from_noise,
        stories=_story_interval(pairs) if not confounds else None,
        noise=noise,
        margin=margin,
        speed=_ratio([(a.speed, b.speed) for a, b in pairs]),
        memory=_ratio([(a.training_memory, b.training_memory) for a, b in pairs]),
        energy=_ratio([(a.results.energy_joules, b.results.energy_joules) for a, b in pairs]),
        equal_time=_equal_time(arm, baseline, pairs) if paired and not of_speed else None,
        failures=tuple(_failures(arm, baseline)),
        diverged=sum(run.state == "diverged" for run in arm.runs),
        baseline_diverged=sum(run.state == "diverged" for run in baseline.runs),
    )
    return correct([comparison])[0]


def _noise_of_baseline(baseline: Arm, cache: RunCache | None) -> Noise | None:
    """Spread of the baseline's runs, or of the other seeds in the folder of a single one."""
    found = noise_of(baseline.finished)
    if found is None and baseline.finished:
        found = noise_floor(baseline.finished[0], cache)
    return found


def _failures(arm: Arm, baseline: Arm) -> Iterable[str]:
    for side in (arm, baseline):
        for run in side.runs:
            if not run.finished:
                reason = f" ({run.reason})" if run.reason else ""
                yield f"{side.name}, seed {run.config.seed}: {run.state}{reason}"


def _pair(arm: Arm, baseline: Arm) -> tuple[list[tuple[Run, Run]], bool]:
    """Runs of the two with the same seeds, and True; if no seed is shared, all runs in order, and False."""
    ours = {run.seeds: run for run in arm.finished}
    theirs = {run.seeds: run for run in baseline.finished}
    pairs = [(ours[seeds], theirs[seeds]) for seeds in ours if seeds in theirs]
    if pairs:
        return pairs, True
    return list(zip(arm.finished, baseline.finished, strict=False)), False


def _recipe_interval(
    arm: Arm, baseline: Arm, pairs: Sequence[tuple[Run, Run]], paired: bool
) -> Interval | None:
    """Difference of the final losses, over the seeds; None for too few of them."""
    if paired:
        return statistics.mean_interval([a.loss - b.loss for a, b in pairs])
    return statistics.unpaired_interval(arm.losses, baseline.losses) if pairs else None


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


def compare_runs(results: Sequence[Run], margin: float | None = None) -> list[Comparison]:
    """Group ``results`` into arms and compare each with the first; a seed counts once.

    The difference between two arms is the factor if one factor covers it; else they are confounded.
    """
    baseline, *arms = group_runs(results)
    comparisons = []
    for arm in arms:
        changed = set(changed_fields(baseline.runs[0].config, arm.runs[0].config))
        factor = infer_factor(changed)
        allowed = frozenset(changed) if factor else frozenset()
        comparisons.append(compare_arms(arm, baseline, allowed, margin=margin))
    return correct(comparisons)


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


def _ratio(values: Sequence[tuple[Any, ...]]) -> Ratio | None:
    if not values or not all(x and y for x, y in values):
        return None
    return Ratio(*statistics.ratio_interval([x for x, _ in values], [y for _, y in values]))


def _equal_time(arm: Arm, baseline: Arm, pairs: Sequence[tuple[Run, Run]]) -> EqualTime | None:
    """The difference at the time when the faster run of each pair ended, read off the curves."""
    differences, progress = [], []
    slower_arm = 0
    for a, b in pairs:
        curves = [[(e.seconds, e.val_loss) for e in run.evaluations] for run in (a, b)]
        if min(len(curve) for curve in curves) < 2:
            return None
        ends = [curve[-1][0] for curve in curves]
        at = min(ends)
        if at < max(curve[0][0] for curve in curves):
            return None
        ours, theirs = (_interpolated(curve, at) for curve in curves)
        differences.append(ours - theirs)
        progress.append(at / max(ends))
        slower_arm += ends[0] > ends[1]
    if not differences:
        return None
    interval = statistics.mean_interval(differences)
    return EqualTime(
        float(np.mean(differences)),
        interval.low if interval else None,
        interval.high if interval else None,
        float(np.mean(progress)),
        arm.name if 2 * slower_arm > len(pairs) else baseline.name,
    )


def _interpolated(curve: Sequence[tuple[float, float]], seconds: float) -> float:
    times, losses = zip(*curve, strict=True)
    return float(np.interp(math.log(seconds), np.log(times), losses))
