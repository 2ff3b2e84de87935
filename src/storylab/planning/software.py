"""How well kinds of software use a GPU; a kind is one entry of :data:`SOFTWARE`.

This module does not load torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class Traffic:
    """Bytes that elementwise operations move per element, forward and backward together, and the number
    of kernels that they start. Defaults are for unfused operations.

    Attributes:
        norm: per element of the residual stream that goes through a norm.
        rotary: per feature of a query or key that is rotated.
        gate: per hidden feature of the feed-forward layer, its activation and product.
        residual: per element of a residual sum.
        logit: per logit: written, its softmax, the gradient, both read by products.
        block_kernels: kernels of a block.
        other_kernels: kernels of the rest of the model.
        mix: per element of a sum with learned scales: embedding residual, value residual.
        norm_kernels: kernels of a norm that not every model has.
        mix_kernels: kernels of a sum with learned scales.
        least_update: whether an update moves the least memory that it can, rather than as much as PyTorch.
    """

    norm: float
    rotary: float
    gate: float
    residual: float
    logit: float
    block_kernels: int
    other_kernels: int
    mix: float = 88
    norm_kernels: int = 16
    mix_kernels: int = 10
    least_update: bool = False


@dataclass(frozen=True)
class Software:
    """The shares of a GPU's limits that a kind of software reaches.

    Attributes:
        name: in tables.
        products: share of the peak rate in matrix products.
        attention: the same in attention.
        bandwidth: share of the memory's bandwidth in elementwise work.
        launch: seconds that the GPU waits between two kernels.
        update_launch: the same in the update, which torch.compile is not used for.
        traffic: bytes and kernels of its elementwise operations.
    """

    name: str
    products: float
    attention: float
    bandwidth: float
    launch: float
    update_launch: float
    traffic: Traffic


# Unfused, fused by a compiler, and the theoretical minimum.
UNFUSED = Traffic(84, 48, 27, 22, 34, 120, 40)
FUSED = Traffic(16, 8, 16, 16, 12, 25, 15, mix=40, norm_kernels=2, mix_kernels=3)
LEAST = Traffic(10, 4, 12, 8, 6, 15, 10, mix=24, norm_kernels=2, mix_kernels=1, least_update=True)
LIMIT = Software("the card's limit", 1.0, 1.0, 1.0, 0.0, 0.0, LEAST)
# Round figures that reproduce the published speeds in docs/plan.md: calibrated, not derived.
SOFTWARE: dict[str, Software] = {
    "eager": Software("eager PyTorch", 0.80, 0.50, 0.92, 8e-6, 8e-6, UNFUSED),
    "compiled": Software("torch.compile", 0.83, 0.60, 0.85, 3e-6, 8e-6, FUSED),
    "handwritten": Software("hand-written kernels", 0.92, 0.80, 0.90, 2e-6, 2e-6, LEAST),
}

if TYPE_CHECKING:
    SoftwareName = str
else:
    # For the parser of flags.
    SoftwareName = Literal[tuple(SOFTWARE)]
