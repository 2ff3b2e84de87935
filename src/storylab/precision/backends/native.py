"""torch's own FP8 products, ``torch._scaled_mm``: nothing has to be installed.

Scales and elements are those of the emulation, and so is every rounding but the order of a product's sums.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storylab.config import Backend
from storylab.errors import UserError
from storylab.precision.backends.protocol import (
    EMULATED,
    PrecisionBackend,
    require_features,
    without_block_choice,
)
from storylab.precision.features import Capability
from storylab.precision.formats import E5M2
from storylab.precision.recipes import Operands, Recipe
from storylab.precision.scalings import PER_ROW, PER_TENSOR

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Native:
    """torch's FP8 products for one recipe.

    Attributes:
        recipe: of the layers.
        alignment: 1, as operands are padded.
        compiles: see :class:`PrecisionBackend`.
    """

    recipe: Recipe
    alignment: int = 1
    compiles: bool = True
    name: Backend = "native"

    def layer(self, linear: nn.Linear) -> nn.Module:
        from storylab.precision.scaled_linear import ScaledLinear

        return ScaledLinear(linear, self.recipe)

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()


def _multiplies(operands: Operands | None) -> bool:
    """Whether ``_scaled_mm`` has a product of these operands; None is a product in bfloat16."""
    if operands is None:
        return True
    left, right = operands
    # cuBLAS has no product of two operands in E5M2 (its table of types for cublasLtMatmul).
    both_wide = left.format is right.format is E5M2
    return left.scaling is right.scaling in (PER_TENSOR, PER_ROW) and not both_wide


def computes(recipe: Recipe) -> bool:
    """Whether torch computes exactly this recipe, on some GPU."""
    recipe = without_block_choice(recipe)
    products = (recipe.forward, recipe.input_gradient, recipe.weight_gradient)
    plain = not recipe.hadamard and recipe.low_forward_share == 1
    return plain and any(products) and all(_multiplies(operands) for operands in products)


def load(recipe: Recipe, gpu: str, capability: Capability) -> PrecisionBackend:
    """torch's FP8 products for ``recipe`` on a GPU called ``gpu``.

    Raises:
        UserError: the GPU has no FP8 products, or torch has none for exactly this recipe.
    """
    require_features(recipe, gpu, capability)
    if not computes(recipe):
        raise UserError(
            "torch multiplies E4M3 by E4M3 or E5M2, with one scale a tensor or a row: use --dtype "
            f"fp8-current or fp8-rowwise, or {EMULATED}"
        )
    return Native(recipe)
