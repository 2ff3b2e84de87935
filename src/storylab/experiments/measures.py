"""Measure the metrics that an expectation may name; their texts are in ``experiment.METRICS``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from storylab.experiments.comparison import Comparison
from storylab.experiments.curves import extrapolate
from storylab.experiments.experiment import Expectation
from storylab.experiments.statistics import mean_interval
from storylab.record.run import Run

if TYPE_CHECKING:
    from storylab.experiments.outcome import CellResult, Outcome

# A number with the ends of its interval, each None where it is not known.
Measured = tuple[float | None, float | None, float | None]
_UNKNOWN: Measured = (None, None, None)


@dataclass(frozen=True)
class Checked:
    """An expectation with the measured number, or None if there is none."""

    expectation: Expectation
    condition: str
    value: float | None
    low: float | None = None
    """Lower end of the number's 95 % interval, where it has one."""
    high: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the number is within the bounds; None without one, without its interval, or if a bound
        is inside it."""
        if self.value is None or self.low is None or self.high is None:
            return None
        bounds = (self.expectation.at_least, self.expectation.at_most)
        if any(b is not None and self.low <= b <= self.high for b in bounds):
            return None
        return self.missed_bound is None

    @property
    def missed_bound(self) -> float | None:
        """The bound that the number is beyond, or None."""
        low, high = self.expectation.at_least, self.expectation.at_most
        if self.value is not None and low is not None and self.value < low:
            return low
        if self.value is not None and high is not None and self.value > high:
            return high
        return None


def _comparison(cell: CellResult, outcome: Outcome) -> Comparison | None:
    key = (cell.condition, cell.arm.name)
    found = (c for c in outcome.comparisons if (c.condition, c.arm) == key)
    return next((c for c in found if not c.confounds), None)


def _loss_difference(cell: CellResult, outcome: Outcome) -> Measured:
    c = _comparison(cell, outcome)
    if c is None or c.recipes is None:
        return _UNKNOWN
    ends = c.judgement.ends or (None, None)
    return c.recipes.estimate, *ends


def _ratio(name: str) -> Callable[[CellResult, Outcome], Measured]:
    def measured(cell: CellResult, outcome: Outcome) -> Measured:
        c = _comparison(cell, outcome)
        ratio = getattr(c, name) if c and not c.speed_confounds else None
        return (ratio.value, ratio.low, ratio.high) if ratio else _UNKNOWN

    return measured


def _mean(values: Sequence[float | None]) -> Measured:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return _UNKNOWN
    interval = mean_interval(known)
    mean = float(np.mean(known))
    return (mean, interval.low, interval.high) if interval else (mean, None, None)


def _plateau(cell: CellResult, outcome: Outcome) -> Measured:
    """The geometric mean over seeds and fits; unknown if any seed or fit predicts none."""
    plateaus = []
    for run in cell.arm.finished:
        found = extrapolate(*curve_after_warmup(run))
        if found is None or found.plateaus is None:
            return _UNKNOWN
        plateaus.append(found.plateaus)
    if not plateaus or len({len(of_seed) for of_seed in plateaus}) > 1:
        return _UNKNOWN
    logs = np.log(plateaus)
    value = math.exp(float(logs.mean()))
    intervals = [mean_interval(list(of_start)) for of_start in logs.T]
    known = [interval for interval in intervals if interval]
    if not known:
        return value, None, None
    # As wide as the starts of the fits disagree, and the seeds within each.
    low, high = min(i.low for i in known), max(i.high for i in known)
    return value, math.exp(low), math.exp(high)


def curve_after_warmup(run: Run) -> tuple[list[int], list[float]]:
    """Iterations and validation losses of a run's evaluations once its warm-up is over: none for a
    run that is nothing but warm-up."""
    points = [p for p in run.evaluations if p.iteration >= run.config.warmup_iters]
    if run.config.warmup_iters >= run.config.max_iters:
        points = []
    return [p.iteration for p in points], [p.val_loss for p in points]


MEASURES: dict[str, Callable[[CellResult, Outcome], Measured]] = {
    "loss_difference": _loss_difference,
    "speed_ratio": _ratio("speed"),
    "memory_ratio": _ratio("memory"),
    "tokens_per_second": lambda cell, _: _mean([run.speed for run in cell.arm.finished]),
    "val_loss": lambda cell, _: _mean(cell.arm.losses),
    "plateau_iteration": _plateau,
}
