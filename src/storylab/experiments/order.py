"""Put arms in an order as far as their common seeds resolve it.

Means alone put any arms in some order. Here a place in it counts as resolved only if the paired
differences over the common seeds are shown not to be zero, corrected for the number of tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from storylab.experiments.comparison import Arm
from storylab.experiments.statistics import ALPHA, holm, mean_interval
from storylab.record.run import Run


def common_values(arms: Sequence[Arm], number: Callable[[Run], float]) -> np.ndarray:
    """A number of the finished runs of those seeds that every arm has, ``[arms, seeds]``."""
    runs = [{run.seeds: run for run in arm.finished} for arm in arms]
    seeds = sorted(set.intersection(*(set(of_arm) for of_arm in runs))) if runs else []
    return np.array([[number(of_arm[s]) for s in seeds] for of_arm in runs], float)


def difference_p(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of "no difference" of two arms over paired seeds; 1 for fewer than two seeds."""
    interval = mean_interval(list(a - b))
    return 1.0 if interval is None else interval.p


@dataclass(frozen=True)
class Order:
    """Arms by the mean of a number, lowest first."""

    ranks: tuple[int, ...]
    """Indices of the arms in this order."""
    resolved: tuple[bool, ...]
    """Whether each arm is resolved from the next one."""
    lowest: tuple[int, ...]
    """Indices of the arms that may have the lowest number: those that no other is shown to be below."""

    @property
    def unresolved(self) -> list[tuple[int, ...]]:
        """Neighbors in the order that are not resolved, joined where they overlap."""
        groups: list[tuple[int, ...]] = []
        for place, resolved in enumerate(self.resolved):
            pair = self.ranks[place : place + 2]
            if resolved:
                continue
            if groups and groups[-1][-1] == pair[0]:
                groups[-1] += (pair[1],)
            else:
                groups.append(pair)
        return groups


def order_of(values: np.ndarray) -> Order:
    """The order of arms by their means.

    Args:
        values: ``[arms, seeds]``, paired by seed.

    Neighbors are tested against each other, with a chance of at most 5 % to tell any equal ones
    apart (Holm's correction). The arm that is truly lowest is among ``lowest`` with 95 %: each is
    tested on its side of 5 % divided by the number of the others (multiple comparisons with the
    best: Hsu 1984, Annals of Statistics 12, 1136-1144).
    """
    ranks = [int(i) for i in np.argsort(values.mean(axis=1), kind="stable")]
    neighbors = holm([difference_p(values[a], values[b]) for a, b in pairwise(ranks)])
    level = 2 * ALPHA / max(len(ranks) - 1, 1)
    lowest = [
        index
        for place, index in enumerate(ranks)
        if all(difference_p(values[index], values[lower]) >= level for lower in ranks[:place])
    ]
    return Order(tuple(ranks), tuple(p < ALPHA for p in neighbors), tuple(lowest))


def front_of(costs: np.ndarray, losses: np.ndarray) -> list[list[int]]:
    """The arms that none is shown to beat in both cost and loss, cheapest first.

    Args:
        costs: ``[arms, seeds]``, above zero; compared by their ratios.
        losses: ``[arms, seeds]`` in nats, of the same seeds.

    Returns:
        Indices of arms, in groups. A later group is shown to have a lower loss than those before it;
        within a group the arms are not resolved in loss, or not in cost, so only some of them may be
        on the front.
    """
    level = ALPHA / max(len(losses) - 1, 1)
    means = losses.mean(axis=1)
    groups: list[list[int]] = []
    best = -1
    for index in (int(i) for i in np.argsort(costs.mean(axis=1), kind="stable")):
        if best < 0:
            groups.append([index])
            best = index
            continue
        apart = difference_p(losses[index], losses[best]) < level
        slower = difference_p(np.log(costs[index]), np.log(costs[best])) < level
        if apart and means[index] < means[best]:
            groups.append([index])
        elif not (apart and slower):
            groups[-1].append(index)
        if means[index] < means[best]:
            best = index
    return groups
