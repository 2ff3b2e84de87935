"""Learning rate of an iteration: linear warm-up, then a named course."""

from __future__ import annotations

import math
from collections.abc import Callable

from storylab.config import ScheduleName, TrainConfig

# Share of (peak - min_lr) that is left at progress 0 to 1 between warm-up and the last iteration.
SCHEDULES: dict[ScheduleName, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """Learning rate of ``iteration`` (from 0): i / warmup_iters of the peak, then the schedule."""
    if iteration < config.warmup_iters:
        return config.learning_rate * iteration / config.warmup_iters
    span = max(config.max_iters - config.warmup_iters, 1)
    progress = min((iteration - config.warmup_iters) / span, 1.0)
    left = SCHEDULES[config.schedule](progress)
    return config.min_lr + left * (config.learning_rate - config.min_lr)
