"""Foresee the true difference that each planned look finds with a chance of 80 %, from like runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

from storylab.config import TrainConfig
from storylab.errors import UserError
from storylab.experiments.experiment import Experiment
from storylab.experiments.factors import changed_fields, infer_factor
from storylab.experiments.looks import look_levels
from storylab.experiments.statistics import ALPHA, detectable_difference
from storylab.experiments.variance import FEWEST_ARMS, MOST_BORROWED
from storylab.files import exists
from storylab.record.folder import CONFIG
from storylab.record.index import RunCache, run_folders
from storylab.record.run import Run

# Runs count as like if they train on at most this many times more tokens, or fewer.
LIKE_LENGTH = 2.0


@dataclass(frozen=True)
class Spread:
    """The expected standard deviation over seeds of an arm's paired difference.

    Attributes:
        nats: None where no like runs are known.
        source: where it comes from, for the user.
    """

    nats: float | None
    source: str


def expected_spread(
    experiment: Experiment, fingerprint: str, runs: Path, cache: RunCache
) -> Spread:
    """The spread of paired differences that like runs have: same data and preset, about the same length,
    and recipes that differ in one factor. Without such pairs an upper bound from the seeds of one recipe.

    Args:
        experiment: the plan.
        fingerprint: of its data set.
        runs: the folder of run folders, which need not exist.
        cache: runs that have been read.
    """
    recipes = _by_recipe(_like_runs(experiment, fingerprint, runs, cache))
    pairs = [
        [a[seeds].loss - b[seeds].loss for seeds in common]
        for a, b in combinations(recipes, 2)
        if len(common := sorted(a.keys() & b.keys())) > 1 and _is_one_factor(a, b)
    ]
    if (nats := typical_deviation(pairs)) is not None:
        count = "a pair" if len(pairs) == 1 else f"{len(pairs)} pairs"
        return Spread(nats, f"that of {count} of like recipes in {runs}")
    noise = typical_deviation([[run.loss for run in recipe.values()] for recipe in recipes])
    if noise is not None:
        return Spread(
            math.sqrt(2) * noise,
            f"at most, from the seed noise of like runs in {runs}: arms that share seeds differ less",
        )
    return Spread(None, f"unknown: there are no like runs in {runs}")


def _like_runs(
    experiment: Experiment, fingerprint: str, runs: Path, cache: RunCache
) -> Iterator[Run]:
    """Finished runs on the same data, with preset and length of one of the baselines."""
    wanted = [c.config for c in experiment.cells if c.arm == experiment.baseline]
    for folder in run_folders(runs) if exists(runs) else ():
        with contextlib.suppress(UserError):  # `list` names a damaged one
            if not exists(folder / CONFIG):
                continue
            head = cache.head(folder)
            if head.data.fingerprint != fingerprint or not _is_like(head.config, wanted):
                continue
            run = cache.load(folder)
            if run.finished:
                yield run


def _is_like(config: TrainConfig, wanted: Iterable[TrainConfig]) -> bool:
    return any(
        config.preset == other.preset
        and abs(math.log(config.total_tokens / other.total_tokens)) <= math.log(LIKE_LENGTH)
        for other in wanted
    )


def _by_recipe(runs: Iterable[Run]) -> list[dict[tuple[int, int], Run]]:
    """Runs by recipe and code version, and then by seeds."""
    recipes: list[dict[tuple[int, int], Run]] = []
    for run in runs:
        for recipe in recipes:
            other = next(iter(recipe.values()))
            if run.code_versions == other.code_versions and not changed_fields(
                run.config, other.config
            ):
                recipe[run.seeds] = run
                break
        else:
            recipes.append({run.seeds: run})
    return recipes


def _is_one_factor(a: dict[tuple[int, int], Run], b: dict[tuple[int, int], Run]) -> bool:
    one, other = next(iter(a.values())), next(iter(b.values()))
    if one.code_versions != other.code_versions:
        return False
    return infer_factor(set(changed_fields(one.config, other.config))) is not None


def typical_deviation(samples: Iterable[Sequence[float]]) -> float | None:
    """Root of the median variance of samples, each corrected to be right in the median; None without any.

    The median keeps a pair with a broken arm from deciding.
    """
    variances = [
        float(np.var(values, ddof=1))
        * (len(values) - 1)
        / float(stats.chi2.median(len(values) - 1))
        for values in samples
        if len(values) > 1
    ]
    found = float(np.median(variances)) if variances else 0.0
    return math.sqrt(found) if found > 0 else None


def detectable_at_looks(experiment: Experiment, spread: float) -> list[tuple[int, float]]:
    """The true difference in nats that each planned look finds in one arm, or in one main effect of a
    factorial experiment, with a chance of 80 %; infinite for a single seed.

    Args:
        experiment: the plan, with at least two arms.
        spread: standard deviation of the paired differences.
    """
    arms = _tests(experiment)
    if experiment.factorial:
        # Means over half of the cells are more precise than cells.
        spread *= math.sqrt(2 / len(experiment.arms))
    levels = look_levels(experiment.looks, ALPHA / (arms * len(experiment.conditions)))
    return [
        (n, detectable_difference(spread, n, level, _df(experiment, arms, n)))
        for n, level in zip(experiment.looks, levels, strict=True)
    ]


def _tests(experiment: Experiment) -> int:
    """Differences that are judged under every condition: of arms, or effects."""
    design = experiment.factorial
    return len(design.effects) if design else len(experiment.arms) - 1


def _df(experiment: Experiment, arms: int, n: int) -> float:
    """Degrees of freedom of the noise of ``n`` seeds; see :mod:`storylab.experiments.variance`."""
    own = n - 1.0
    if experiment.variance == "pooled":
        return arms * own
    if experiment.variance == "moderated" and arms >= FEWEST_ARMS:
        return min(MOST_BORROWED + own, arms * own)
    return own


def foresight_lines(
    experiment: Experiment, fingerprint: str, runs: Path, cache: RunCache
) -> Iterator[str]:
    """Say what the plan can see, and whether that is enough for its margin; nothing for a single arm."""
    count = _tests(experiment) * len(experiment.conditions)
    if count < 1:
        return
    spread, margin = expected_spread(experiment, fingerprint, runs, cache), experiment.margin
    known = spread.nats is not None
    found = detectable_at_looks(experiment, spread.nats if spread.nats is not None else 1.0)
    unit = "nats" if known else "x the spread"
    sizes = [
        f"{n} seeds: {difference:.{4 if known else 1}f} {unit}" if n > 1 else "1 seed: nothing"
        for n, difference in found
    ]
    arms = f"{'1 arm' if count == 1 else f'{count} arms'} against the baseline"
    if experiment.factorial:
        arms = f"main effects, of {count} effects (interactions: twice as much)"
    value = f"{spread.nats:.4f} nats, " if spread.nats is not None else ""
    yield (
        f"Seen with a chance of 80 %, {arms}: {'; '.join(sizes)}"
        f"{'' if margin is None else f' (margin {margin:g})'}"
    )
    yield f"  (spread of the differences over seeds: {value}{spread.source})"
    if known and margin is not None and found[-1][1] > margin:
        yield (
            f"  Even the look at {found[-1][0]} seeds cannot see a difference of the margin reliably: plan "
            "more seeds in looks, or choose a larger margin"
        )
