"""Observations on the size of the model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from storylab.experiments.outcome import Outcome
from storylab.reporting.tables import time_and_loss_front
from storylab.training.log_format import format_duration

# A size is as good as the best if its loss is within this many nats of it.
GOOD_ENOUGH = 0.02


def size_observations(outcome: Outcome) -> Iterable[str]:
    """The Pareto front, and the best trade by criteria that are named."""
    front = time_and_loss_front(outcome)
    if not front:
        return
    told = "; ".join(
        f"{cell.name} ({format_duration(time)}, {loss:.3f})" for cell, time, loss in front
    )
    yield f"No other arm has both less training time and a lower loss than: {told}."
    for condition in outcome.conditions:
        arms = [cell for cell in outcome.arms(condition) if cell.arm.finished]
        if not arms:
            continue
        best = min(arms, key=lambda cell: float(np.mean(cell.arm.losses)))
        least = float(np.mean(best.arm.losses))
        near = [c for c in arms if float(np.mean(c.arm.losses)) <= least + GOOD_ENOUGH]
        small = min(near, key=lambda cell: cell.arm.finished[0].parameters)
        where = f" at {condition}" if condition else ""
        yield (
            f"Lowest loss{where}: {best.arm.name} ({least:.3f}). Best trade by the criterion "
            f'"smallest within {GOOD_ENOUGH} nats of the lowest": {small.arm.name} '
            f"({small.arm.finished[0].parameters:,} parameters, {float(np.mean(small.arm.losses)):.3f})."
        )
