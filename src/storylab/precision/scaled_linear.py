"""A linear layer whose products run on a GPU's FP8 units, by ``torch._scaled_mm``.

Its elements and scales are those of the emulation (:mod:`storylab.precision.quantize`). A CPU computes
the same products, far more slowly; tests use that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from storylab.precision.formats import E4M3, E5M2, Format
from storylab.precision.quantize import per_row_scale, per_tensor_scale, tensor_amax
from storylab.precision.recipes import Operand, Operands, Recipe

# torch's names of the formats.
FLOAT8: dict[Format, torch.dtype] = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
# cuBLAS takes rows of this many bytes, and multiples of it (cublasLtMatmul, FP8 kernels).
ALIGNMENT = 16


@dataclass(frozen=True)
class Scaled:
    """A tensor in FP8, ``elements * scale``.

    Attributes:
        elements: ``[M, K]`` float8, row after row.
        scale: float32, a scalar for the tensor or ``[M, 1]``, one for each row.
    """

    elements: Tensor
    scale: Tensor

    def transposed(self) -> Scaled:
        """The transpose, its rows contiguous; only where one scale covers the tensor."""
        return Scaled(self.elements.T.clone(memory_format=torch.contiguous_format), self.scale)


def scaled(values: Tensor, operand: Operand) -> Scaled:
    """Quantize ``values [M, K]`` (float32 or bfloat16) by ``operand``, scaled by tensor or by row."""
    form = operand.format
    if operand.scaling.per_tensor:
        encode = per_tensor_scale(tensor_amax(values), form)
    else:
        encode = per_row_scale(values, form)
    # Clamped, as torch's casts differ between versions beyond the format's range.
    wanted = (values.float() * encode).clamp(-form.max, form.max)
    elements = wanted.to(FLOAT8[form], memory_format=torch.contiguous_format)
    return Scaled(elements, 1.0 / encode)


def scaled_product(left: Scaled, right: Scaled, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """``left [M, K]`` times ``right [N, K]`` transposed: ``[M, N]`` in ``dtype``.

    Operands are padded with zeros, so M, N and K may be any sizes.

    Args:
        left: any.
        right: with scales as ``left`` has them, by tensor or by row.
        dtype: bfloat16, or float32 if scaled by tensor.
        fast: let the units of a Hopper GPU add with fewer bits.
    """
    count = len(right.elements)
    right_scale = right.scale
    if right_scale.dim():
        right_scale = nn.functional.pad(right_scale, (0, 0, 0, -count % ALIGNMENT), value=1.0).T
    product: Tensor = torch._scaled_mm(
        _padded(left.elements, rows=1),
        _padded(right.elements, rows=ALIGNMENT).T,
        scale_a=left.scale,
        scale_b=right_scale,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    return product.narrow(1, 0, count)


def _padded(elements: Tensor, rows: int) -> Tensor:
    """``elements [M, K]`` with zeros up to multiples of ``rows`` and of 16 columns."""
    missing = (0, -elements.shape[1] % ALIGNMENT, 0, -elements.shape[0] % rows)
    if not any(missing):
        return elements
    # As bytes, of which torch can pad any kind; a byte of zeros is 0 in both formats.
    return nn.functional.pad(elements.view(torch.uint8), missing).view(elements.dtype)


class ScaledLinear(nn.Module):
    """A linear layer without bias that multiplies in FP8 by ``recipe``; weights stay float32.

    Args:
        linear: the layer whose weight it uses.
        recipe: of the products; those without operands are in bfloat16.
    """

    def __init__(self, linear: nn.Linear, recipe: Recipe) -> None:
        super().__init__()
        self.weight = linear.weight
        self.recipe = recipe

    def forward(self, input: Tensor) -> Tensor:
        """``[..., out]`` of ``input [..., in]``."""
        device = input.device.type
        if torch.is_autocast_enabled(device):  # as the layer before would pass it on
            input = input.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            output: Tensor = ScaledProducts.apply(input, self.weight, self.recipe)
        return output


class ScaledProducts(torch.autograd.Function):
    """The three products; the gradient is straight-through (Bengio et al. 2013, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.recipe = recipe
        rows = input.reshape(-1, weight.shape[1])
        if recipe.forward is None:
            output = rows.bfloat16() @ weight.bfloat16().T
        else:
            left, right = recipe.forward
            # Both libraries let this product add with fewer bits, and no gradient's.
            output = scaled_product(
                scaled(rows, left), scaled(weight, right), torch.bfloat16, fast=True
            )
        return output.to(input.dtype).reshape(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        rows = input.reshape(-1, weight.shape[1])
        out = gradients[0].reshape(-1, weight.shape[0])
        shared = scaled(out, recipe.input_gradient[0]) if recipe.shares_output_grad else None  # type: ignore[index]
        input_gradient = _input_gradient(out, weight, recipe.input_gradient, shared)
        weight_gradient = _weight_gradient(out, rows, recipe.weight_gradient, shared)
        return input_gradient.to(input.dtype).reshape(input.shape), weight_gradient.float(), None


def _input_gradient(
    out: Tensor, weight: Tensor, operands: Operands | None, shared: Scaled | None
) -> Tensor:
    """``out [M, O]`` times ``weight [O, I]``, which sums over output features."""
    if operands is None:
        return out.bfloat16() @ weight.bfloat16()
    left, right = operands
    return scaled_product(shared or scaled(out, left), _columns(weight, right), torch.bfloat16)


def _weight_gradient(
    out: Tensor, rows: Tensor, operands: Operands | None, shared: Scaled | None
) -> Tensor:
    """``out [M, O]`` transposed times ``rows [M, I]``, which sums over tokens."""
    if operands is None:
        return out.bfloat16().T @ rows.bfloat16()
    left, right = operands
    gradients = shared.transposed() if shared else _columns(out, left)
    # Products of operands that are scaled by row come in bfloat16 only.
    dtype = torch.float32 if left.scaling.per_tensor else torch.bfloat16
    return scaled_product(gradients, _columns(rows, right), dtype)


def _columns(values: Tensor, operand: Operand) -> Scaled:
    """``values [M, K]`` quantized as ``[K, M]``."""
    if operand.scaling.per_tensor:
        return scaled(values, operand).transposed()
    return scaled(values.T, operand)
