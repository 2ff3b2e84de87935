"""Batches whose loss is not finite, whenever they are trained on, as bad data makes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch

from storylab.data.batches import TrainingBatches
from storylab.model.transformer import Transformer

MAKE, FORWARD = TrainingBatches.__call__, Transformer.forward


def poisoned(
    numbers: Collection[int], value: float = math.nan
) -> tuple[Callable[[TrainingBatches, int], torch.Tensor], Callable[..., Any]]:
    """``TrainingBatches.__call__`` and ``Transformer.forward`` that multiply a loss by ``value``.

    No batch of finite weights gives NaN by itself.
    """
    bad: list[torch.Tensor] = []

    def noted(batches: TrainingBatches, number: int) -> torch.Tensor:
        batch = MAKE(batches, number)
        if number in numbers:
            bad.append(batch[:, :-1])
        return batch

    def forward(model: Transformer, ids: torch.Tensor, *args: Any) -> Any:
        loss = FORWARD(model, ids, *args)
        hit = torch.is_grad_enabled() and any(
            ids.shape[1:] == b.shape[1:] and (b == ids[0]).all(dim=1).any() for b in bad
        )
        return loss * value if hit else loss

    return noted, forward
