"""Precision recipes as data: which operand of which product is quantised, how, and what is left alone.

A linear layer y = x W' has three products: forward (x, W), input gradient (dy, W) and weight gradient
(dy, x). Blocks always lie along the axis that a product sums over. A recipe is one entry.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal

from storylab.errors import UserError

Scaling = Literal["delayed", "tensor", "mxfp8", "nvfp4"]


@dataclass(frozen=True)
class Operand:
    """How one operand of a product is quantised."""

    format: Literal["e4m3", "e5m2", "e2m1"]
    scaling: Scaling
    square: bool = False
    """16 x 16 blocks instead of 1 x 16 (nvfp4)."""
    stochastic: bool = False
    """Rounding by chance instead of to nearest (nvfp4)."""
    four_over_six: bool = False
    """Blocks scaled to 4 instead of 6 where that errs less (nvfp4)."""


@dataclass(frozen=True)
class Recipe:
    """The operands of the three products; None leaves both operands of a product in bfloat16.

    Embedding, head, norms and attention products are never quantised.
    """

    forward: tuple[Operand, Operand] | None
    """Input and weight."""
    input_gradient: tuple[Operand, Operand] | None
    """Output gradient and weight."""
    weight_gradient: tuple[Operand, Operand] | None
    """Output gradient and input."""
    hadamard: bool = False
    """Random Hadamard transform of the weight gradient's operands."""
    high_first: int = 0
    """First blocks that stay in bfloat16."""
    high_last_share: float = 0.0
    """Share of the blocks, counted from the last, that stay in bfloat16; rounded up."""
    history: int = 1024
    """Steps whose largest magnitude a delayed scale is made from."""
    margin: int = 0
    """Powers of two that a delayed scale stays below the format's range."""

    @property
    def delayed(self) -> bool:
        """Whether any operand's scale comes from the steps before."""
        products = (self.forward, self.input_gradient, self.weight_gradient)
        return any(o.scaling == "delayed" for operands in products if operands for o in operands)

    def low_blocks(self, layers: int) -> range:
        """Indices of the blocks whose linear layers are quantised."""
        last = -(-round(self.high_last_share * layers * 1e6) // 10**6)
        return range(min(self.high_first, layers), max(layers - last, 0))


def _fp8(scaling: Scaling) -> Recipe:
    """E4M3 forward and E5M2 for gradients (Micikevicius et al. 2022, arXiv 2209.05433)."""
    forward, gradient = Operand("e4m3", scaling), Operand("e5m2", scaling)
    return Recipe((forward, forward), (gradient, forward), (gradient, forward))


_MX = Operand("e4m3", "mxfp8")
_NV = Operand("e2m1", "nvfp4")
_NV_WEIGHT = Operand("e2m1", "nvfp4", square=True)
_NV_GRADIENT = Operand("e2m1", "nvfp4", stochastic=True)
_NVFP4 = Recipe(
    (_NV, _NV_WEIGHT),
    (_NV_GRADIENT, _NV_WEIGHT),
    (_NV_GRADIENT, _NV),
    hadamard=True,
    high_last_share=0.15,
)

RECIPES: dict[str, Recipe] = {
    "fp8": _fp8("delayed"),
    "fp8-current": _fp8("tensor"),
    # Mishra et al. 2025, arXiv 2506.08027: E4M3 for gradients too, scales rounded up.
    "mxfp8": Recipe((_MX, _MX), (_MX, _MX), (_MX, _MX)),
    # NVIDIA 2025, arXiv 2509.25149.
    "nvfp4": _NVFP4,
}
