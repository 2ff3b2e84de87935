"""Precision recipes as data: which operand of which product is quantized, and how.

A linear layer y = x W' has three products: forward (x, W), input gradient (dy, W) and weight gradient
(dy, x), in papers fprop, dgrad and wgrad. Blocks always run along the axis that a product sums over. A
recipe is one entry of :data:`RECIPES`. This module does not load torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from storylab.config import ModelConfig
from storylab.model.cost import linear_flops, training_flops
from storylab.precision.features import Capability
from storylab.precision.formats import E2M1, E4M3, E5M2, Format, MatrixUnit
from storylab.precision.scalings import (
    DELAYED,
    MXFP8_SCALING,
    NVFP4_SCALING,
    PER_ROW,
    PER_TENSOR,
    Scaling,
)


@dataclass(frozen=True)
class Operand:
    """How one operand of a product is quantized."""

    format: Format
    scaling: Scaling
    square: bool = False
    """16 x 16 blocks instead of 1 x 16 (nvfp4)."""
    stochastic: bool = False
    """Stochastic rounding instead of rounding to nearest (nvfp4)."""
    four_over_six: bool = False
    """Blocks scaled to 4 instead of 6 where that errs less (nvfp4)."""

    @property
    def transposable(self) -> bool:
        """Whether the transpose of the quantized tensor is the quantized transpose."""
        return self.scaling.transposable(self)

    @property
    def bytes_per_element(self) -> float:
        """Bytes of an element in memory, its share of the block scale included."""
        return self.scaling.bytes_per_element(self.format)


OPTIONS = ("square", "stochastic", "four_over_six")
Operands = tuple[Operand, Operand]


@dataclass(frozen=True)
class Recipe:
    """The operands of the three products; None leaves both operands of a product in bfloat16.

    Embedding, head, norms and attention products are never quantized.
    """

    forward: Operands | None
    """Input and weight."""
    input_gradient: Operands | None
    """Output gradient and weight."""
    weight_gradient: Operands | None
    """Output gradient and input."""
    hadamard: bool = False
    """Random Hadamard transform of the weight gradient's operands."""
    high_first: int = 0
    """Number of first blocks that stay in bfloat16."""
    high_last_share: float = 0.0
    """Share of the blocks, counted from the last, that stay in bfloat16; rounded up."""
    low_forward_share: float = 1.0
    """Share of the iterations after which the forward products are in bfloat16."""
    history: int = 1024
    """Number of earlier steps whose largest magnitudes a delayed scale is made from."""
    margin: int = 0
    """Powers of two that a delayed scale stays below the format's range."""

    @property
    def operands(self) -> list[Operand]:
        """Every quantized operand."""
        products = (self.forward, self.input_gradient, self.weight_gradient)
        return [operand for operands in products if operands for operand in operands]

    @property
    def delayed(self) -> bool:
        """Whether any operand's scale comes from earlier steps."""
        return any(operand.scaling.delayed for operand in self.operands)

    @property
    def shares_output_grad(self) -> bool:
        """Whether both gradient products read the same quantized output gradient."""
        if self.input_gradient is None or self.weight_gradient is None or self.hadamard:
            return False
        first, second = self.input_gradient[0], self.weight_gradient[0]
        return first == second and first.scaling.per_tensor

    @property
    def matrix_unit(self) -> MatrixUnit:
        """The rate of a GPU at which the products run: that of the narrowest format."""
        narrowest = min((operand.format for operand in self.operands), key=lambda form: form.bits)
        return narrowest.matrix_unit

    @property
    def bytes_per_element(self) -> float:
        """Bytes of an element of a quantized operand in memory, the mean over the operands."""
        return sum(o.bytes_per_element for o in self.operands) / len(self.operands)

    @property
    def alignment(self) -> int:
        """Tokens of a sequence and features of a layer must be multiples of this in hardware."""
        return max(operand.scaling.alignment for operand in self.operands)

    @property
    def required_features(self) -> set[str]:
        """Names of the GPU features that the products need."""
        return {operand.scaling.feature.name for operand in self.operands}

    def missing_features(self, capability: Capability) -> list[str]:
        """Names of the features that a GPU of this compute capability lacks, sorted."""
        features = {operand.scaling.feature for operand in self.operands}
        return sorted(feature.name for feature in features if not feature.present(capability))

    @property
    def quantized_gemms(self) -> float:
        """How many of a quantized layer's three products are quantized, the mean over the iterations."""
        count = float(sum(getattr(self, product) is not None for product in PRODUCTS))
        return count - (1 - self.low_forward_share if self.forward else 0.0)

    def with_option(self, role: str, option: str, on: bool) -> Recipe:
        """This recipe with an option of the operands in ``role`` (input, weight, gradient) on or off."""
        changed: dict[str, Any] = {}
        change: dict[str, Any] = {option: on}
        for product, roles in PRODUCTS.items():
            operands: Operands | None = getattr(self, product)
            if operands is not None:
                changed[product] = tuple(
                    dataclasses.replace(operand, **change) if name == role else operand
                    for name, operand in zip(roles, operands, strict=True)
                )
        return dataclasses.replace(self, **changed)

    def quantized_blocks(self, layers: int) -> range:
        """Indices of the blocks whose linear layers are quantized."""
        last = -(-round(self.high_last_share * layers * 1e6) // 10**6)
        return range(min(self.high_first, layers), max(layers - last, 0))


def _fp8(scaling: Scaling) -> Recipe:
    """E4M3 forward and E5M2 for gradients (Micikevicius et al. 2022, arXiv 2209.05433)."""
    forward, gradient = Operand(E4M3, scaling), Operand(E5M2, scaling)
    return Recipe((forward, forward), (gradient, forward), (gradient, forward))


def _same(operand: Operand) -> Recipe:
    """One kind of operand everywhere."""
    return Recipe((operand, operand), (operand, operand), (operand, operand))


_NV = Operand(E2M1, NVFP4_SCALING)
_NV_WEIGHT = Operand(E2M1, NVFP4_SCALING, square=True)
_NV_GRADIENT = Operand(E2M1, NVFP4_SCALING, stochastic=True)
_NVFP4 = Recipe(
    (_NV, _NV_WEIGHT),
    (_NV_GRADIENT, _NV_WEIGHT),
    (_NV_GRADIENT, _NV),
    hadamard=True,
    high_last_share=0.15,
)

RECIPES: dict[str, Recipe] = {
    "fp8": _fp8(DELAYED),
    "fp8-current": _fp8(PER_TENSOR),
    # torchao's "rowwise".
    "fp8-rowwise": _same(Operand(E4M3, PER_ROW)),
    # Mishra et al. 2025, arXiv 2506.08027: E4M3 for gradients too, scales rounded up.
    "mxfp8": _same(Operand(E4M3, MXFP8_SCALING)),
    # NVIDIA 2025, arXiv 2509.25149.
    "nvfp4": _NVFP4,
    # Without the parts for which GeForce cards have no instructions.
    "nvfp4-plain": Recipe(
        (_NV, _NV_WEIGHT), (_NV, _NV_WEIGHT), (_NV, _NV), high_last_share=_NVFP4.high_last_share
    ),
}
ALIASES = {"fp4": "nvfp4", "nvf4": "nvfp4"}
PRODUCTS = {
    "forward": ("input", "weight"),
    "input_gradient": ("gradient", "weight"),
    "weight_gradient": ("gradient", "input"),
}


def quantized_flops_fraction(
    recipe: Recipe, model: ModelConfig, vocab_size: int, block_size: int
) -> float:
    """Share of a training run's matrix multiplication, in FLOPs, that the recipe quantizes."""
    blocks = len(recipe.quantized_blocks(model.n_layer))
    whole = training_flops(model, vocab_size, block_size)
    return blocks * recipe.quantized_gemms * linear_flops(model) / whole


def layer_name(block: int, name: str) -> str:
    """Name of a quantized layer in statistics: the index of its block, then its name in the block."""
    return f"{block} {name}"


def block_of(layer: str) -> int:
    """Index of the block of a layer that :func:`layer_name` has named."""
    return int(layer.partition(" ")[0])
