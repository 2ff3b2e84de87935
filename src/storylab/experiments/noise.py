"""The spread of the final loss over seeds of one recipe, and of differences paired by seed.

Arms of the same seeds share their initial weights and data order, so much of the seeds' spread drops
out of their differences: the spread of one recipe alone says little of what pairs can see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storylab.data.tally import plural
from storylab.errors import UserError
from storylab.experiments.comparison import Noise
from storylab.experiments.factors import changed_fields, infer_factor
from storylab.experiments.statistics import (
    correlation,
    detectable_difference,
    median_unbiased,
    typical_deviation,
)
from storylab.files import exists
from storylab.record.folder import CONFIG
from storylab.record.index import RunCache, run_folders
from storylab.record.run import Run, RunHead

# Fewer common seeds say too little of the spread of one pair of recipes.
LEAST_PAIRS = 3
PLANNED_PAIRS = (3, 5, 10)
Recipe = dict[tuple[int, int], Run]
"""Finished runs of one recipe, on one data set and by one version of the code, by their seeds."""


@dataclass(frozen=True)
class PairedSpread:
    """How much the difference of two recipes varies over the seeds that both have."""

    differences: tuple[float, ...]
    """Of the final losses, in nats a token."""
    correlation: float | None
    """Of the two recipes' final losses over the seeds; None if it is not known."""

    @property
    def seeds(self) -> int:
        """Number of common seeds."""
        return len(self.differences)

    @property
    def standard_deviation(self) -> float:
        """Of the differences, in nats a token; see :func:`~.statistics.median_unbiased`."""
        return median_unbiased(float(np.std(self.differences, ddof=1)), self.seeds)


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
    found, problems = runs_where(
        run.folder.parent, lambda head: same_recipe(head, run), cache or RunCache()
    )
    return [other for other in (run, *found) if other.code_versions == run.code_versions], problems


def runs_where(
    runs: Path, wanted: Callable[[RunHead], bool], cache: RunCache
) -> tuple[list[Run], list[str]]:
    """Runs in a folder, by their config and data.

    Args:
        runs: the folder of run folders.
        wanted: whether to take a run.
        cache: runs that have been read.

    Returns:
        The runs, in the order of their names, and the faults of those that cannot be read.

    Raises:
        UserError: the folder itself cannot be read.
    """
    found, problems = [], []
    for folder in run_folders(runs):
        try:
            if exists(folder / CONFIG) and wanted(cache.head(folder)):
                found.append(cache.load(folder))
        except UserError as error:
            problems.append(str(error))
    return found, problems


def by_recipe(runs: Iterable[Run]) -> list[Recipe]:
    """The finished ones among ``runs``, by recipe. Of runs with the same seeds the first one counts: a run
    that was set aside comes after the one that replaced it."""
    recipes: list[Recipe] = []
    for run in runs:
        if run.finished:
            recipe = next((recipe for recipe in recipes if _is_of(run, recipe)), None)
            if recipe is None:
                recipes.append({run.seeds: run})
            else:
                recipe.setdefault(run.seeds, run)
    return recipes


def _is_of(run: Run, recipe: Recipe) -> bool:
    other = next(iter(recipe.values()))
    return run.code_versions == other.code_versions and same_recipe(run, other)


def spreads_between(
    pairs: Iterable[tuple[Recipe, Recipe]], least_seeds: int = 2
) -> list[PairedSpread]:
    """The spread of the differences between the two recipes of every pair, where it can be known.

    Pairs are left out if they differ in more than one factor, in their data or in their code, if they have
    fewer than ``least_seeds`` common seeds, or if they differ by the same number at every seed.
    """
    found = []
    for a, b in pairs:
        common = sorted(a.keys() & b.keys())
        if len(common) < least_seeds or not _differ_in_one_factor(a, b):
            continue
        ours, theirs = ([recipe[seeds].loss for seeds in common] for recipe in (a, b))
        differences = tuple(x - y for x, y in zip(ours, theirs, strict=True))
        if len(set(differences)) > 1:
            found.append(PairedSpread(differences, correlation(ours, theirs)))
    return found


def _differ_in_one_factor(a: Recipe, b: Recipe) -> bool:
    one, other = (next(iter(recipe.values())) for recipe in (a, b))
    return one.code_versions == other.code_versions and _is_like(one, other)


def _is_like(a: Run | RunHead, b: Run) -> bool:
    """Whether two runs have the same data and recipes that differ in one factor."""
    changed = set(changed_fields(a.config, b.config))
    return a.data.fingerprint == b.data.fingerprint and infer_factor(changed) is not None


def paired_spreads(runs: Iterable[Run], cache: RunCache | None = None) -> list[PairedSpread]:
    """The spread of paired differences between one recipe and others of the same folder.

    The others differ from it in one factor, with the same data and code, and have at least three seeds
    in common with it. Runs that cannot be read are passed over.

    Args:
        runs: finished and other runs of the recipe, of one folder and code version.
        cache: runs that have been read already.
    """
    ours = next(iter(by_recipe(runs)), {})
    if len(ours) < LEAST_PAIRS:
        return []
    first = next(iter(ours.values()))
    like, _ = runs_where(
        first.folder.parent, lambda head: _is_like(head, first), cache or RunCache()
    )
    return spreads_between(((other, ours) for other in by_recipe(like)), LEAST_PAIRS)


def typical_spread(floor: Noise, spreads: list[PairedSpread]) -> float:
    """The typical standard deviation of a paired difference, in nats a token.

    Without any ``spreads`` it is that of two independent runs, an upper bound unless the arm is noisier
    than this recipe.
    """
    known = typical_deviation(spread.differences for spread in spreads)
    if known is not None:
        return known
    return math.sqrt(2) * median_unbiased(floor.standard_deviation, floor.seeds)


def seen_by_pairs(floor: Noise, spreads: list[PairedSpread]) -> list[str]:
    """Lines on the smallest difference that pairs of seeds would find with a chance of 80 %.

    From the :func:`typical_spread`.
    """
    spread = typical_spread(floor, spreads)
    if spreads:
        deviations = [known.standard_deviation for known in spreads]
        correlations = [s.correlation for s in spreads if s.correlation is not None]
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
            "or none that changes the losses, so the gain of pairing by seed is not known"
        ]
    note = (
        "" if spreads else " (without pairing: an upper bound for an arm as noisy as this recipe)"
    )
    return lines + [
        f"  {pairs} pairs of seeds could see {detectable_difference(spread, pairs):.4f}{note}"
        for pairs in PLANNED_PAIRS
    ]
