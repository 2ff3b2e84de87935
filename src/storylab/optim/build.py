"""Build the optimizers of a run; functions that a step applies to all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from storylab.optim import OPTIMIZERS, REST
from storylab.optim.entry import OptimizerEntry, ParameterGroups

if TYPE_CHECKING:
    from storylab.config import TrainConfig
    from storylab.model.transformer import Transformer


def build_optimizers(model: Transformer, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that update ``model``: the config's, followed by AdamW if the config's is only
    for the matrices of the blocks. Matrices and embeddings decay, norm gains and scales do not.

    The ``lr_ratio`` of a parameter group is its learning rate over the step's; ``state_names`` of an
    optimizer are the tensors that it keeps for a parameter.

    Raises:
        TypeError: an optimizer would not skip a step, see :func:`require_skipping`.
    """
    entry = OPTIMIZERS[config.optimizer]
    matrices = dict(model.block_matrices()) if entry.matrices_only else {}
    built: list[tuple[OptimizerEntry, ParameterGroups]] = []
    if matrices:
        group = {"params": list(matrices), "parts": list(matrices.values())}
        built.append((entry, [group | {"weight_decay": config.weight_decay}]))
    rest = [p for p in model.parameters() if p not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    built.append((REST if matrices else entry, groups))
    return [_built(entry, groups, config) for entry, groups in built]


def _built(
    entry: OptimizerEntry, groups: ParameterGroups, config: TrainConfig
) -> torch.optim.Optimizer:
    optimizer = entry.build(groups, config)
    require_skipping(optimizer)
    if entry.rate_field:
        for group in optimizer.param_groups:
            group["lr_ratio"] = getattr(config, entry.rate_field) / config.learning_rate
    optimizer.state_names = entry.state_names  # type: ignore[attr-defined]
    return optimizer


def require_skipping(optimizer: torch.optim.Optimizer) -> None:
    """Make sure that an optimizer leaves weights and state alone where ``found_inf`` is set, see
    :func:`skip_where`. torch's do so if fused, by an attribute that torch.amp.GradScaler uses too;
    others ignore it and would write NaN.

    Raises:
        TypeError: it does not say so.
    """
    if not (
        getattr(optimizer, "skips_where_found_inf", False)
        or getattr(optimizer, "_step_supports_amp_scaling", False)
    ):
        raise TypeError(
            f"{type(optimizer).__name__} does not heed found_inf, so a step whose gradient is not "
            "finite would spoil the weights: use its fused form, or heed it and set "
            "skips_where_found_inf"
        )


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Set the learning rate of every parameter group, given the run's ``learning_rate``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


def skip_where(optimizers: Iterable[torch.optim.Optimizer], skip: Tensor) -> None:
    """Let the next step change nothing where ``skip`` (a bool scalar) is true, without reading it.

    By the attribute that torch's fused optimizers look at, see torch.amp.GradScaler.
    """
    for optimizer in optimizers:
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
