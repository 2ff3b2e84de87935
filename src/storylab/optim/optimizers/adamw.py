"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), torch's fused one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storylab.optim.entry import OptimizerEntry, ParameterGroups, UpdateCost

if TYPE_CHECKING:
    import torch

    from storylab.config import TrainConfig


def build(groups: ParameterGroups, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW for ``groups``."""
    import torch

    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        [dict(group) for group in groups], lr=config.learning_rate, betas=betas, fused=True
    )


ENTRIES = (
    OptimizerEntry(
        name="adamw",
        label="AdamW",
        build=build,
        # Weight, gradient and both moments are read, and all but the gradient written, in one kernel for
        # many parameters.
        cost=UpdateCost(bytes=28, least_bytes=28, state=2, kernels=10),
        state_names=frozenset({"step", "exp_avg", "exp_avg_sq"}),
    ),
)
