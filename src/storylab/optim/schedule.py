"""Learning rate of an iteration: linear warm-up, then a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storylab.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """The course of the learning rate from the end of the warm-up (progress 0) to the last iteration (1).

    A schedule with a parameter reads it from a separate field of the config, marked ``"schedule"``.

    Attributes:
        left: share of (learning_rate - min_lr) at a progress.
        decays: whether it ends below its peak, so that ``min_lr`` is read.
        bends: where its course changes its form: between them it is a line or part of a cosine.
    """

    left: Callable[[float, TrainConfig], float]
    decays: bool = True
    bends: Callable[[TrainConfig], tuple[float, ...]] = lambda config: ()


SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule(lambda progress, config: 0.5 * (1.0 + math.cos(math.pi * progress))),
    "linear": Schedule(lambda progress, config: 1.0 - progress),
    "constant": Schedule(lambda progress, config: 1.0, decays=False),
}


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """Learning rate of ``iteration`` (from 0): i / warmup_iters of the peak, then the schedule."""
    if iteration < config.warmup_iters:
        return config.learning_rate * iteration / config.warmup_iters
    span = max(config.max_iters - config.warmup_iters, 1)
    progress = min((iteration - config.warmup_iters) / span, 1.0)
    left = SCHEDULES[config.schedule].left(progress, config)
    if left == 1.0:
        return config.learning_rate  # which the sum below may miss by its last bit
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
        span = config.max_iters - config.warmup_iters
        for bend in SCHEDULES[config.schedule].bends(config):
            edges.add(config.warmup_iters + round(bend * span))
    borders = sorted(edge for edge in edges if 0 <= edge <= end)
    found: set[int] = set()
    for first, last in pairwise(borders):
        found |= {first + i for i in range(_ENOUGH)} | {last - i for i in range(_ENOUGH)}
        found |= {first + (last - first) * i // _ENOUGH for i in range(_ENOUGH)}
    return sorted(i for i in found if 0 <= i < end)
