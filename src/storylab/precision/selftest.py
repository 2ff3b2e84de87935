"""The precision self-test: does each layer multiply as its recipe says?

Every quantized layer multiplies known random inputs by its weight, forward and backward. Each of its
three products is compared with float32 and, on hardware, with the emulation. The error of a product
that silently stays in bfloat16 is too small; a broken product's is too large, or has no gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from storylab.errors import UserError
from storylab.precision.backends.protocol import PrecisionBackend
from storylab.precision.convert import make_layer
from storylab.precision.linear import BackendLinear, QuantizedLinear
from storylab.precision.recipes import PRODUCTS, Operand, Recipe
from storylab.precision.state import QuantizationState

TOKENS = 128
# On N(0, 1) data a product in bfloat16 has a relative error of 0.003, one in E4M3 0.03 or more.
LOW_FROM = 0.012
STOCHASTIC_FACTOR = 1.4
# Hardware rounds as the emulation does, but adds in another order and truncates on the way.
MAX_DEVIATION = 0.02


@dataclass(frozen=True)
class ProductCheck:
    """One product of one layer. Errors are relative to the norm of the float32 product."""

    layer: str
    product: str
    wanted_low: bool
    error: float
    bound: float
    deviation: float | None
    """Relative distance of the backend's product from the emulated one; None if emulation runs."""
    deviation_bound: float

    @property
    def low(self) -> bool:
        """Whether its error shows that it was computed in low precision."""
        return self.error > LOW_FROM

    @property
    def failure(self) -> str | None:
        """The problem in words, or None."""
        if not math.isfinite(self.error):
            return "is not finite"
        if self.error > 0.99:
            return "is zero or has nothing to do with the right one"
        if self.wanted_low and not self.low:
            return f"errs by {self.error:.4f} only: it does not run in low precision"
        if self.error > self.bound:
            return f"errs by {self.error:.3f}, more than {self.bound:.3f}"
        if self.deviation is not None and self.deviation > self.deviation_bound:
            return (
                f"is {self.deviation:.3f} from the emulation, more than {self.deviation_bound:.3f}"
            )
        return None


def check_model(
    blocks: nn.ModuleList, recipe: Recipe, backend: PrecisionBackend | None
) -> list[ProductCheck]:
    """Check every quantized layer of a model, without changing the model.

    Raises:
        UserError: a product does not run as the recipe says.
    """
    checks: list[ProductCheck] = []
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(module, QuantizedLinear | BackendLinear):
                checks += check_layer(f"block {index} {name}", module.weight, recipe, backend)
    failures = [f"{c.layer}, {c.product}: {c.failure}" for c in checks if c.failure]
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise UserError(
            f"precision self-test failed: {failures[0]}{more}; try --backend emulated, or "
            "--dtype bfloat16"
        )
    return checks


def check_layer(
    name: str, weight: Tensor, recipe: Recipe, backend: PrecisionBackend | None
) -> Iterator[ProductCheck]:
    """Check the three products of a new layer with a copy of this weight ``[out, in]``."""
    recipe = dataclasses.replace(recipe, low_forward_share=1.0)
    generator = torch.Generator().manual_seed(0)
    if not weight.any():  # zeros would show nothing
        weight = torch.randn(weight.shape, generator=generator).to(weight.device)
    input, gradient = (
        torch.randn(TOKENS, size, generator=generator).to(weight.device).bfloat16()
        for size in reversed(weight.shape)
    )
    exact = (
        input.float() @ weight.detach().float().T,
        gradient.float() @ weight.detach().float(),
        gradient.float().T @ input.float(),
    )
    emulated = _products(weight, input, gradient, recipe, None)
    computed = emulated
    if backend is not None:
        computed = _products_of_backend(name, weight, input, gradient, recipe, backend)
    for product, right, ours, emulation in zip(PRODUCTS, exact, computed, emulated, strict=True):
        operands: tuple[Operand, ...] = getattr(recipe, product) or ()
        norm = float(right.norm())
        bound = math.hypot(LOW_FROM, *(_operand_error(operand) for operand in operands))
        stochastic = any(operand.stochastic for operand in operands)
        yield ProductCheck(
            name,
            product,
            bool(operands),
            float((ours - right).norm()) / norm,
            bound,
            None if backend is None else float((ours - emulation).norm()) / norm,
            2 * bound if stochastic else MAX_DEVIATION,
        )


def _operand_error(operand: Operand) -> float:
    factor = STOCHASTIC_FACTOR if operand.stochastic else 1.0
    return operand.format.rel_error_bound * factor


def _products(
    weight: Tensor,
    input: Tensor,
    gradient: Tensor,
    recipe: Recipe,
    backend: PrecisionBackend | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients of a new layer, float32; a missing gradient counts as zeros."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight.detach().clone())
    state = QuantizationState(seed=0, max_iters=1)
    layer = make_layer(plain, recipe, state, "self-test", backend)
    input = input.clone().requires_grad_()
    # Delayed scales come from the step before; TransformerEngine's are 1 in the first step.
    for step in range(2 if recipe.delayed else 1):
        input.grad = plain.weight.grad = None
        state.advance(step)
        autocast = torch.autocast(input.device.type, torch.bfloat16)
        with autocast, nullcontext() if backend is None else backend.context():
            output = layer(input)
        output.backward(gradient.to(output.dtype))
    found = []
    for tensor in (input, plain.weight):
        found.append(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
    return output.detach().float(), found[0].float(), found[1].float()


def _products_of_backend(
    name: str,
    weight: Tensor,
    input: Tensor,
    gradient: Tensor,
    recipe: Recipe,
    backend: PrecisionBackend,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_products`, with the layer that ``backend`` computes.

    Raises:
        UserError: it refuses; the message names the layer.
    """
    try:
        return _products(weight, input, gradient, recipe, backend)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"precision self-test failed: {name}: {backend.name} says: {reason}; try --backend "
            "emulated, or --dtype bfloat16"
        ) from error


def summarize(checks: list[ProductCheck]) -> dict[str, object]:
    """The result as JSON values: the number of products, how many of them run in low precision, their
    errors by layer, and the largest distance from the emulation."""
    return {
        "products": len(checks),
        "low": sum(check.low for check in checks),
        "layers": {
            layer: {c.product: round(c.error, 5) for c in checks if c.layer == layer}
            for layer in dict.fromkeys(check.layer for check in checks)
        },
        "largest_distance_from_emulation": max(
            (check.deviation for check in checks if check.deviation is not None), default=None
        ),
    }
