"""Foresee the true difference that each planned look finds with a chance of 80 %, from like runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from storylab.config import TrainConfig
from storylab.experiments.experiment import Experiment
from storylab.experiments.looks import look_levels
from storylab.experiments.noise import Recipe, by_recipe, runs_where, spreads_between
from storylab.experiments.statistics import ALPHA, detectable_difference, typical_deviation
from storylab.experiments.variance import FEWEST_ARMS, MOST_BORROWED
from storylab.files import exists
from storylab.record.index import RunCache

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
    recipes = _like_recipes(experiment, fingerprint, runs, cache)
    spreads = spreads_between(combinations(recipes, 2))
    if (nats := typical_deviation(spread.differences for spread in spreads)) is not None:
        count = "a pair" if len(spreads) == 1 else f"{len(spreads)} pairs"
        return Spread(nats, f"that of {count} of like recipes in {runs}")
    noise = typical_deviation([run.loss for run in recipe.values()] for recipe in recipes)
    if noise is not None:
        return Spread(
            math.sqrt(2) * noise,
            f"at most, from the seed noise of like runs in {runs}: arms that share seeds differ less",
        )
    return Spread(None, f"unknown: there are no like runs in {runs}")


def _like_recipes(
    experiment: Experiment, fingerprint: str, runs: Path, cache: RunCache
) -> list[Recipe]:
    """Recipes on the same data, with preset and length of one of the baselines."""
    wanted = [c.config for c in experiment.cells if c.arm == experiment.baseline]
    if not exists(runs):
        return []
    like, _ = runs_where(  # `list` names a damaged one
        runs,
        lambda head: head.data.fingerprint == fingerprint and _is_like(head.config, wanted),
        cache,
    )
    return by_recipe(like)


def _is_like(config: TrainConfig, wanted: Iterable[TrainConfig]) -> bool:
    return any(
        config.preset == other.preset
        and abs(math.log(config.total_tokens / other.total_tokens)) <= math.log(LIKE_LENGTH)
        for other in wanted
    )


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
