"""The facts about an optimizer, in one object: how to build it, its name, and the cost of its update.

Nothing here imports torch, so that the config can list the names and a plan can ask for costs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from storylab.config import TrainConfig

ParameterGroups = Sequence[Mapping[str, Any]]
"""``params`` and their ``weight_decay``; of the blocks' matrices also ``parts``, for each the rows of the
projections that it fuses."""


@dataclass(frozen=True)
class UpdateCost:
    """Work and memory of an update by an optimizer.

    Attributes:
        bytes: memory traffic an element, as PyTorch moves it; of matrix products none.
        least_bytes: the least traffic an element that the update could do with.
        state: float32 numbers kept for an element.
        row_state: float32 numbers kept for a row of a matrix.
        kernels: kernels of an update of any size, clipping included.
        weight_kernels: kernels for each weight.
        shape_kernels: kernels for all matrices of one shape, matrix products left out.
        product_kernels: matrix products for all matrices of one shape.
        product_flops: FLOPs of the matrix products for a matrix, given its rows and columns.
    """

    bytes: float
    least_bytes: float
    state: int
    row_state: int = 0
    kernels: int = 0
    weight_kernels: int = 0
    shape_kernels: int = 0
    product_kernels: int = 0
    product_flops: Callable[[int, int], int] = lambda rows, columns: 0


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer.

    Attributes:
        name: value of ``--optimizer``.
        label: its name in a report.
        build: makes it for groups of parameters. It must leave weights and state alone where its attribute
            ``found_inf`` is set, see :func:`storylab.optim.build.require_skipping`.
        cost: of its update.
        state_names: tensors that it keeps for every parameter, as in a checkpoint.
        matrices_only: whether it updates the matrices of the blocks alone, and AdamW the rest.
        rate_field: config field with its own peak learning rate, which follows the course of
            ``learning_rate``; empty where it takes that one.
    """

    name: str
    label: str
    build: Callable[[ParameterGroups, TrainConfig], torch.optim.Optimizer]
    cost: UpdateCost
    state_names: frozenset[str]
    matrices_only: bool = False
    rate_field: str = ""
