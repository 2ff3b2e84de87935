"""Learning rate of an iteration: linear warm-up, then a named course."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

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


# Two lines, two half cosines or one of each meet in three places at most, unless they are the same.
_ENOUGH = 8


def telling_iterations(configs: Iterable[TrainConfig], end: int) -> list[int]:
    """Iterations below ``end`` at which courses of the learning rate differ if they differ anywhere.

    As many for a run of any length: the first ones of every stretch on which all the courses are a line or
    part of a cosine, its last ones, and some between.
    """
    edges = {0, end}
    for config in configs:
        edges |= {config.warmup_iters, config.max_iters}
    borders = sorted(edge for edge in edges if 0 <= edge <= end)
    found: set[int] = set()
    for first, last in pairwise(borders):
        found |= {first + i for i in range(_ENOUGH)} | {last - i for i in range(_ENOUGH)}
        found |= {first + (last - first) * i // _ENOUGH for i in range(_ENOUGH)}
    return sorted(i for i in found if 0 <= i < end)
