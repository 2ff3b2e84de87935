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
        logit: per logit: its softmax and the gradient. Products write and read logits too, which is
            counted with them.
        weight: per weight of a product, in every micro-batch: cast, its gradient cast and added up.
        block_kernels: kernels of a block's elementwise work.
        other_kernels: kernels of the rest of the model.
        mix: per element of a sum with learned scales: embedding residual, value residual.
        norm_kernels: kernels of a norm that not every model has.
        mix_kernels: kernels of a sum with learned scales.
        narrow: per element of a residual sum, what a residual stream of bfloat16 saves of it and its norm.
        least_update: whether an update moves the least memory that it can, rather than as much as PyTorch.
    """

    norm: float
    rotary: float
    gate: float
    residual: float
    logit: float
    weight: float
    block_kernels: int
    other_kernels: int
    mix: float = 88
    norm_kernels: int = 16
    mix_kernels: int = 10
    narrow: float = 1
    least_update: bool = False


@dataclass(frozen=True)
class Software:
    """The shares of a GPU's limits that a kind of software reaches.

    Attributes:
        name: in tables.
        products: share of the rate of large products that the products of training reach.
        attention: the same in attention.
        bandwidth: share of the memory's bandwidth in elementwise work.
        gap: seconds of the GPU that every kernel takes to begin and to end.
        launch: seconds of the host that it takes to start a kernel.
        traffic: bytes and kernels of its elementwise operations.
        limit: whether products are compared with the card's limit instead of measured products.
    """

    name: str
    products: float
    attention: float
    bandwidth: float
    gap: float
    launch: float
    traffic: Traffic
    limit: bool = False


# Unfused, fused by a compiler, and the theoretical minimum. Fused work is counted in the code that the
# compiler writes for this package's blocks (benchmarks/plan_check.py --count) and for the head's loss.
UNFUSED = Traffic(84, 48, 27, 22, 34, 24, 120, 40)
FUSED = Traffic(16, 34, 16, 16, 8, 24, 25, 15, mix=40, norm_kernels=2, mix_kernels=3, narrow=17)
LEAST = Traffic(
    10, 4, 12, 8, 6, 16, 15, 10, mix=24, norm_kernels=2, mix_kernels=1, narrow=8, least_update=True
)
LIMIT = Software("the card's limit", 1.0, 1.0, 1.0, 0.0, 0.0, LEAST, limit=True)
# Fitted to six published speeds by benchmarks/plan_check.py, and rounded.
PRODUCTS, BANDWIDTH, FUSED_BANDWIDTH, GAP = 1.0, 0.80, 0.77, 4.4e-6
SOFTWARE: dict[str, Software] = {
    "eager": Software("eager PyTorch", PRODUCTS, 0.50, BANDWIDTH, GAP, 8e-6, UNFUSED),
    "compiled": Software("torch.compile", PRODUCTS, 0.60, FUSED_BANDWIDTH, GAP, 8e-6, FUSED),
    "handwritten": Software("hand-written kernels", PRODUCTS, 0.80, BANDWIDTH, GAP, 2e-6, LEAST),
}
# Measured over predicted speed of the runs that these shares were not fitted to, the lowest and the
# highest: another card and another program, or this package on an H100 (docs/plan.md).
UNSEEN_RUNS = (0.70, 1.35)

if TYPE_CHECKING:
    SoftwareName = str
else:
    # For the parser of flags.
    SoftwareName = Literal[tuple(SOFTWARE)]
