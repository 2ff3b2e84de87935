"""Optimizers, learning-rate schedules and the average of the weights.

Every module in ``optimizers/`` holds entries: a new optimizer is a new module there. Its name on the
command line, its line in a plan and a report, and its tests follow from the entry. The config asks for the
names, so this package comes before it, and imports configs and models for their types alone.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module

from storylab.optim import optimizers
from storylab.optim.entry import OptimizerEntry, UpdateCost

__all__ = ["OPTIMIZERS", "REST", "OptimizerEntry", "UpdateCost", "update_costs"]


def _entries() -> Iterator[OptimizerEntry]:
    for module in pkgutil.iter_modules(optimizers.__path__):
        yield from import_module(f"{optimizers.__name__}.{module.name}").ENTRIES


OPTIMIZERS: dict[str, OptimizerEntry] = {entry.name: entry for entry in _entries()}
# Updates the parameters that are not matrices of the blocks where an optimizer is for those alone.
REST = OPTIMIZERS["adamw"]


def update_costs(name: str, parameters: int, in_matrices: int) -> list[tuple[UpdateCost, int]]:
    """The costs of an update, each with the number of elements that it is for.

    Args:
        name: of the optimizer.
        parameters: elements of the model.
        in_matrices: those of them that are in the matrices of the blocks.
    """
    entry = OPTIMIZERS[name]
    if not entry.matrices_only:
        return [(entry.cost, parameters)]
    return [(REST.cost, parameters - in_matrices), (entry.cost, in_matrices)]
