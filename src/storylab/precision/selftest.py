"""The precision self-test: does each layer really multiply as its recipe says?

Every quantised layer multiplies known draws with the weights it has, forward and backward, and each of
its three products is compared with float32 and, on hardware, with the emulation. A product that
silently stays in bfloat16 errs too little, a broken one too much or has no gradient at all.
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
from storylab.precision.convert import make_layer
from storylab.precision.formats import FORMATS
from storylab.precision.hardware import Hardware, HardwareLinear
from storylab.precision.linear import QuantizationState, QuantizedLinear
from storylab.precision.recipes import PRODUCTS, Operand, Recipe

TOKENS = 128
# A product in bfloat16 errs by 0.003 of its norm on normal draws, one in E4M3 by 0.03 and more.
LOW_FROM = 0.012
STOCHASTIC_FACTOR = 1.4
# Hardware adds up in another order and cuts off on the way; the emulation rounds as it does.
APART = 0.02


@dataclass(frozen=True)
class ProductCheck:
    """One product of one layer. Errors are relative to the norm of the float32 product."""

    layer: str
    product: str
    wanted_low: bool
    error: float
    bound: float
    apart: float | None
    """Hardware against emulation; None where emulation is what runs."""
    apart_bound: float

    @property
    def low(self) -> bool:
        """Whether it was computed in low precision, by its error."""
        return self.error > LOW_FROM

    @property
    def fault(self) -> str | None:
        """What is wrong, or None."""
        if not math.isfinite(self.error):
            return "is not finite"
        if self.error > 0.99:
            return "is zero or has nothing to do with the right one"
        if self.wanted_low and not self.low:
            return f"errs by {self.error:.4f} only: it does not run in low precision"
        if self.error > self.bound:
            return f"errs by {self.error:.3f}, more than {self.bound:.3f}"
        if self.apart is not None and self.apart > self.apart_bound:
            return f"is {self.apart:.3f} from the emulation, more than {self.apart_bound:.3f}"
        return None


def check_model(
    blocks: nn.ModuleList, recipe: Recipe, hardware: Hardware | None
) -> list[ProductCheck]:
    """Check every quantised layer of a model; nothing of the model is changed.

    Raises:
        UserError: a product does not run as the recipe says.
    """
    checks: list[ProductCheck] = []
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(module, QuantizedLinear | HardwareLinear):
                checks += check_layer(f"block {index} {name}", module.weight, recipe, hardware)
    faults = [f"{c.layer}, {c.product}: {c.fault}" for c in checks if c.fault]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(
            f"precision self-test failed: {faults[0]}{more}; try --backend emulated, or "
            "--dtype bfloat16"
        )
    return checks


def check_layer(
    name: str, weight: Tensor, recipe: Recipe, hardware: Hardware | None
) -> Iterator[ProductCheck]:
    """Check the three products of a layer with this weight ``[out, in]``, made anew for it."""
    recipe = dataclasses.replace(recipe, low_forward_share=1.0)
    generator = torch.Generator().manual_seed(0)
    if not weight.any():  # a matrix that starts at zero shows nothing
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
    if hardware is not None:
        try:
            computed = _products(weight, input, gradient, recipe, hardware)
        except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"precision self-test failed: {name}: {hardware.name} says: {reason}; try --backend "
                "emulated, or --dtype bfloat16"
            ) from error
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
            None if hardware is None else float((ours - emulation).norm()) / norm,
            2 * bound if stochastic else APART,
        )


def _operand_error(operand: Operand) -> float:
    factor = STOCHASTIC_FACTOR if operand.stochastic else 1.0
    return FORMATS[operand.format].error * factor


def _products(
    weight: Tensor, input: Tensor, gradient: Tensor, recipe: Recipe, hardware: Hardware | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients of a new layer, float32; a missing gradient counts as zeros."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight.detach().clone())
    state = QuantizationState(seed=0, max_iters=1)
    layer = make_layer(plain, recipe, state, "self-test", hardware)
    input = input.clone().requires_grad_()
    # Delayed scales are made from the step before: TransformerEngine's are 1 in the first.
    for step in range(2 if recipe.delayed else 1):
        input.grad = plain.weight.grad = None
        state.advance(step)
        autocast = torch.autocast(input.device.type, torch.bfloat16)
        with autocast, nullcontext() if hardware is None else hardware.context():
            output = layer(input)
        output.backward(gradient.to(output.dtype))
    found = []
    for tensor in (input, plain.weight):
        found.append(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
    return output.detach().float(), found[0].float(), found[1].float()


def summarize(checks: list[ProductCheck]) -> dict[str, object]:
    """The test's result as JSON values: how many products of the quantised layers run low, and the
    largest error of each kind."""
    return {
        "products": len(checks),
        "low": sum(check.low for check in checks),
        "layers": {
            layer: {c.product: round(c.error, 5) for c in checks if c.layer == layer}
            for layer in dict.fromkeys(check.layer for check in checks)
        },
        "largest_distance_from_emulation": max(
            (check.apart for check in checks if check.apart is not None), default=None
        ),
    }
