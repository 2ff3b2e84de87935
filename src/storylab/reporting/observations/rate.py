"""Observations on the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from storylab.experiments.curves import parabola_minimum
from storylab.experiments.factors import under
from storylab.experiments.outcome import CellResult, Outcome
from storylab.experiments.statistics import mean_interval
from storylab.record.run import ENDED


def rate_observations(outcome: Outcome) -> Iterable[str]:
    """The best peak learning rate among arms that differ in it alone."""
    for condition in outcome.conditions:
        base = outcome.baseline_of(condition).config
        grid = [
            cell
            for cell in outcome.arms(condition)
            if cell.config.schedule == base.schedule
            and cell.config.warmup_iters == base.warmup_iters
            and _ended(cell)
        ]
        if len({cell.config.learning_rate for cell in grid}) >= 3:
            where = under("", condition)
            yield from _of_grid(grid, where)


def _ended(cell: CellResult) -> dict[tuple[int, int], float]:
    """Losses by seed of the runs that ended; infinite for one that diverged."""
    return {run.seeds: run.loss for run in cell.arm.runs if run.state in ENDED}


def _of_grid(grid: Sequence[CellResult], where: str) -> Iterable[str]:
    seeds = sorted(set.intersection(*(set(_ended(cell)) for cell in grid)))
    if not seeds:
        return
    rates = [cell.config.learning_rate for cell in grid]
    by_seed = [[_ended(cell)[seed] for cell in grid] for seed in seeds]
    losses = [float(np.mean(column)) for column in zip(*by_seed, strict=True)]
    finite = [rate for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    if not finite:
        yield f"Every peak tried diverged{where}."
        return
    best = int(np.argmin(losses))
    text = (
        f"Of the peaks tried{where}, {rates[best]:g} has the lowest loss ({losses[best]:.3f}, mean of "
        f"{len(seeds)} seeds)"
    )
    optima = [parabola_minimum(rates, of_seed) for of_seed in by_seed]
    found = [math.log(optimum) for optimum in optima if optimum]
    if len(found) == len(optima):
        interval = mean_interval(found)
        span = ""
        if interval:
            span = f" (95 % CI {math.exp(interval.low):.2g} to {math.exp(interval.high):.2g})"
        text += (
            "; a parabola through each seed's best and its neighbours puts the optimum at "
            f"{math.exp(float(np.mean(found))):.2g}{span}"
        )
    else:
        text += (
            "; it is at an end of the grid or next to a diverged run, so the optimum may be outside"
        )
    yield text + "."
    gone = [rate for rate, loss in zip(rates, losses, strict=True) if not math.isfinite(loss)]
    if gone:
        yield (
            f"Diverged{where} at a peak of {min(gone):g}; the highest that trained to its end is "
            f"{max(finite):g}."
        )
    else:
        yield f"No peak up to {max(rates):g} made the loss non-finite{where}."
