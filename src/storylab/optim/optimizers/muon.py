"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) and NorMuon (Li et al. 2025, arXiv
2510.05491), for the matrices of the blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storylab.optim.entry import OptimizerEntry, ParameterGroups, UpdateCost

if TYPE_CHECKING:
    import torch

    from storylab.config import TrainConfig

# Iterations that bring singular values near 1.
NEWTON_SCHULZ_STEPS = 5


def build(groups: ParameterGroups, config: TrainConfig) -> torch.optim.Optimizer:
    """Muon or NorMuon, as the config says, for the one group of ``groups``."""
    from storylab.optim.orthogonal import Muon

    (group,) = groups
    return Muon(
        zip(group["params"], group["parts"], strict=True),
        lr=config.muon_lr,
        weight_decay=group["weight_decay"],
        normalize_rows=config.optimizer == "normuon",
    )


def product_flops(rows: int, columns: int) -> int:
    """FLOPs that orthogonalize a matrix: three products an iteration."""
    short, long = min(rows, columns), max(rows, columns)
    return NEWTON_SCHULZ_STEPS * (4 * short * short * long + 2 * short**3)


ENTRIES = (
    OptimizerEntry(
        name="muon",
        label="Muon",
        build=build,
        cost=UpdateCost(
            bytes=138,
            least_bytes=24,
            state=1,
            weight_kernels=4,
            shape_kernels=13,
            product_kernels=3 * NEWTON_SCHULZ_STEPS,
            product_flops=product_flops,
        ),
        state_names=frozenset({"momentum"}),
        matrices_only=True,
        rate_field="muon_lr",
    ),
    OptimizerEntry(
        name="normuon",
        label="NorMuon",
        build=build,
        cost=UpdateCost(
            bytes=174,
            least_bytes=28,
            state=1,
            row_state=1,
            weight_kernels=4,
            shape_kernels=28,
            product_kernels=3 * NEWTON_SCHULZ_STEPS,
            product_flops=product_flops,
        ),
        state_names=frozenset({"momentum", "row_squares"}),
        matrices_only=True,
        rate_field="muon_lr",
    ),
)
