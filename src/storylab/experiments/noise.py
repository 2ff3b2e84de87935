"""The spread of the final loss over seeds of one recipe, and of differences paired by seed.

Arms of the same seeds share their initial weights and data order, so much of the seeds' spread drops
out of their differences: the spread of one recipe alone says little of what pairs can see.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from storylab.data.tally import plural
from storylab.errors import UserError
from storylab.experiments.comparison import Noise
from storylab.experiments.factors import changed_fields, infer_factor
from storylab.experiments.statistics import detectable_difference
from storylab.files import exists
from storylab.record.folder import CONFIG
from storylab.record.index import RunCache, run_folders
from storylab.record.run import Run, RunHead

# Fewer common seeds say too little of the spread of their differences.
LEAST_PAIRS = 3
PLANNED_PAIRS = (3, 5, 10)


@dataclass(frozen=True)
class PairedSpread:
    """How much the difference of two recipes varies over the seeds that both have."""

    standard_deviation: float
    """Of the paired differences of the final loss, in nats."""
    correlation: float
    """Of the two recipes' final losses over the seeds."""
    seeds: int


def same_recipe(a: Run | RunHead, b: Run) -> bool:
    """Whether two runs differ in their seeds at most: the same config otherwise, and the same data."""
    return a.data.fingerprint == b.data.fingerprint and not changed_fields(a.config, b.config)


def noise_of(runs: Iterable[Run]) -> Noise | None:
    """Spread of final losses of one recipe over its seeds; None for fewer than two seeds, and where
    all are the same to the bit, as nothing is known then."""
    by_seed: dict[tuple[int, int], float] = {}
    for run in runs:
        if run.finished:  # a run that was set aside comes after the one that replaced it
            by_seed.setdefault(run.seeds, run.loss)
    losses = list(by_seed.values())
    if len(losses) < 2 or len(set(losses)) < 2:
        return None
    return Noise(float(np.mean(losses)), float(np.std(losses, ddof=1)), len(losses))


def noise_floor(run: Run, cache: RunCache | None = None) -> Noise | None:
    """Spread of the final loss over seeds: of the runs in the same folder with the same config, data and
    code."""
    found, _ = other_seeds(run, cache)
    return noise_of(found)


def other_seeds(run: Run, cache: RunCache | None = None) -> tuple[list[Run], list[str]]:
    """The run and those in the same folder with the same config (except seeds), data and code; and
    the faults of unreadable ones."""
    cache = cache or RunCache()
    found, problems = [run], []
    for folder in run_folders(run.folder.parent):
        try:
            if not exists(folder / CONFIG):
                continue
            if same_recipe(cache.head(folder), run):
                found.append(cache.load(folder))
        except UserError as error:
            problems.append(str(error))
    return [other for other in found if other.code_versions == run.code_versions], problems


def paired_spreads(runs: Iterable[Run], cache: RunCache | None = None) -> list[PairedSpread]:
    """The spread of paired differences between one recipe and others of the same folder.

    Args:
        runs: finished and other runs of the recipe, of one folder and code version.
        cache: runs that have been read already.

    The others are recipes that differ from it in one factor, with the same data and code, and at
    least three common seeds; a folder that cannot be read is passed over.
    """
    cache = cache or RunCache()
    ours: dict[tuple[int, int], Run] = {}
    for run in runs:
        if run.finished:
            ours.setdefault(run.seeds, run)
    if len(ours) < LEAST_PAIRS:
        return []
    first = next(iter(ours.values()))
    others: list[list[Run]] = []
    for run in _like_runs(first, cache):
        if run.seeds not in ours:
            continue
        group = next((group for group in others if same_recipe(run, group[0])), None)
        if group is None:
            others.append([run])
        elif run.seeds not in {other.seeds for other in group}:
            group.append(run)
    return [
        _paired_spread([(run.loss, ours[run.seeds].loss) for run in group])
        for group in others
        if len(group) >= LEAST_PAIRS
    ]


def _like_runs(first: Run, cache: RunCache) -> Iterator[Run]:
    """Finished runs in the folder of ``first``, with its data and code, that differ in one factor."""
    for folder in run_folders(first.folder.parent):
        try:
            if not exists(folder / CONFIG):
                continue
            head = cache.head(folder)
            same_data = head.data.fingerprint == first.data.fingerprint
            changed = set(changed_fields(head.config, first.config))
            if not same_data or not changed or infer_factor(changed) is None:
                continue
            run = cache.load(folder)
        except UserError:
            continue
        if run.finished and run.code_versions == first.code_versions:
            yield run


def _paired_spread(pairs: list[tuple[float, float]]) -> PairedSpread:
    a, b = np.asarray(pairs).T
    # Losses that are the same in all seeds have no correlation.
    known = a.std() > 0 and b.std() > 0
    correlation = float(np.corrcoef(a, b)[0, 1]) if known else math.nan
    return PairedSpread(float(np.std(a - b, ddof=1)), correlation, len(pairs))


def typical_spread(floor: Noise, spreads: list[PairedSpread]) -> float:
    """Standard deviation of a paired difference: the median of ``spreads``; without any, that of two
    independent runs, an upper bound unless the arm is noisier than this recipe."""
    if spreads:
        return float(np.median([spread.standard_deviation for spread in spreads]))
    return math.sqrt(2) * floor.standard_deviation


def seen_by_pairs(floor: Noise, spreads: list[PairedSpread]) -> list[str]:
    """Lines on the smallest difference that pairs of seeds would find with a chance of 80 %.

    From the :func:`typical_spread`.
    """
    spread = typical_spread(floor, spreads)
    if spreads:
        deviations = [known.standard_deviation for known in spreads]
        correlations = [s.correlation for s in spreads if math.isfinite(s.correlation)]
        middle = f"{float(np.median(correlations)):.2f}" if correlations else "unknown"
        several = len(spreads) > 1
        span = f" (median; {min(deviations):.4f} to {max(deviations):.4f})" if several else ""
        low, high = min(s.seeds for s in spreads), max(s.seeds for s in spreads)
        lines = [
            f"paired differences to {plural(len(spreads), 'like recipe')} in the folder: standard "
            f"deviation {spread:.4f} nats{span}, "
            f"correlation of the losses over seeds {middle}, "
            f"{low if low == high else f'{low} to {high}'} common seeds each"
        ]
    else:
        lines = [
            f"no recipe in the folder that differs in one factor has {LEAST_PAIRS} seeds in common, "
            "so what pairing by seed brings is not known"
        ]
    note = (
        "" if spreads else " (without pairing: an upper bound for an arm as noisy as this recipe)"
    )
    return lines + [
        f"  {pairs} pairs of seeds could see {detectable_difference(spread, pairs):.4f}{note}"
        for pairs in PLANNED_PAIRS
    ]
