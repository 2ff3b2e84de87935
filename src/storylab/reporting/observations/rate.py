"""Observations on the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from storylab.data.tally import plural
from storylab.experiments.factors import qualified_name
from storylab.experiments.optimum import bracket, fit_optimum
from storylab.experiments.outcome import CellResult, Outcome
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
            where = qualified_name("", condition)
            yield from _of_grid(grid, where)


def _ended(cell: CellResult) -> dict[tuple[int, int], float]:
    """Losses by seed of the runs that ended; infinite for one that diverged."""
    return {run.seeds: run.loss for run in cell.arm.runs if run.state in ENDED}


def _of_grid(grid: Sequence[CellResult], where: str) -> Iterable[str]:
    seeds = sorted(set.intersection(*(set(_ended(cell)) for cell in grid)))
    if not seeds:
        return
    rates = [cell.config.learning_rate for cell in grid]
    losses = np.array([[_ended(cell)[seed] for cell in grid] for seed in seeds])
    means = losses.mean(axis=0)
    finite = [rate for rate, loss in zip(rates, means, strict=True) if math.isfinite(loss)]
    if not finite:
        yield f"Every peak tried diverged{where}."
        return
    yield _best(rates, losses, where)
    gone = sorted({rate for rate in rates if rate not in finite})
    if gone:
        yield (
            f"Diverged{where} at a peak of {gone[0]:g}; the highest that trained to its end is "
            f"{max(finite):g}."
        )
    else:
        yield f"No peak up to {max(rates):g} made the loss non-finite{where}."


def _best(rates: Sequence[float], losses: np.ndarray, where: str) -> str:
    """The rate with the lowest loss, and where the optimum is, as far as the seeds show it."""
    found = bracket(rates, losses)
    seeds = len(losses)
    text = (
        f"Of the peaks tried{where}, {found.best:g} has the lowest loss "
        f"({losses.mean(axis=0).min():.3f}, mean of {plural(seeds, 'seed')})"
    )
    if found.level:
        told = ", ".join(f"{rate:g}" for rate in found.level)
        text += f", not resolved from {told}"
    low = "below the grid" if found.low is None else f"{found.low:g}"
    high = "above the grid" if found.high is None else f"{found.high:g}"
    if found.low is None and found.high is None:
        text += ". No peak tried is shown to be worse, so the optimum may be on either side of them"
    elif found.low is None or found.high is None:
        side = f"below {high}" if found.low is None else f"above {low}"
        text += f". The optimum is {side}; it may be outside the peaks tried"
    else:
        text += f". The optimum is between {low} and {high}"
    text += ", if the loss has one valley (95 %, paired by seed). " if seeds > 1 else ". "
    fitted = fit_optimum(rates, losses)
    if isinstance(fitted, str):
        return f"{text}No closer interval is given: {fitted}."
    return (
        f"{text}A parabola over log(rate) has its lowest point at {fitted.rate:.3g} "
        f"(95 % CI {fitted.low:.3g} to {fitted.high:.3g}, if the valley is smooth)."
    )
