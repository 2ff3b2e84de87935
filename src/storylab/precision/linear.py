"""A linear layer whose three products see quantised operands, emulated exactly on any device.

Every product is a matrix product of operands that are exact in bfloat16, accumulated in float32, and
multiplied by the operands' scales afterwards: what the matrix units of the hardware compute, but for the
order in which they add up and what they cut off on the way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from storylab.precision.formats import FORMATS
from storylab.precision.quantize import (
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    Quantized,
    hadamard,
    mxfp8,
    nvfp4,
    per_tensor,
    random_bytes,
)
from storylab.precision.recipes import Operand, Recipe


@dataclass
class QuantizationState:
    """What the quantised layers of a model share: where training stands, and whether they quantise."""

    seed: int
    enabled: bool = True
    iteration: int = 0
    changes: int = 0
    """Counts up whenever the weights may have changed."""
    draws: dict[str, int] = field(default_factory=dict)

    def advance(self, iteration: int) -> None:
        """Go to ``iteration``: its random draws do not depend on what came before."""
        self.iteration = iteration
        self.changed()
        self.draws.clear()

    def changed(self) -> None:
        """The weights are not what they were: what was quantised of them is to be made anew."""
        self.changes += 1

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The layers compute as if they had no recipe while the block runs."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def generator(self, name: str) -> torch.Generator:
        """A generator for the next draw called ``name`` in this iteration."""
        count = self.draws[name] = self.draws.get(name, -1) + 1
        text = f"{self.seed} {self.iteration} {name} {count}"
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class QuantizedLinear(nn.Module):
    """A linear layer without bias that multiplies as ``recipe`` says; weights stay float32.

    Delayed scales have their history in buffers, so that it is in checkpoints.
    """

    amax_history: Tensor

    def __init__(
        self, layer: nn.Linear, recipe: Recipe, state: QuantizationState, name: str
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.recipe, self.state, self.name = recipe, state, name
        self._noting = False
        self._kept: dict[str, tuple[int, Quantized]] = {}
        if recipe.delayed:
            # Largest magnitudes of input, weight and output gradient, the current step's first.
            history = torch.zeros(3, recipe.history, device=layer.weight.device)
            self.register_buffer("amax_history", history)
            self._seen = 0

    def forward(self, input: Tensor) -> Tensor:
        if not self.state.enabled:
            return nn.functional.linear(input, self.weight)
        device = input.device.type
        dtype = input.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        self._noting = torch.is_grad_enabled()  # evaluation must leave no trace in training
        output: Tensor = _QuantizedProduct.apply(input, self.weight, self)
        return output.to(dtype)

    def quantize(self, values: Tensor, operand: Operand, kind: str) -> Quantized:
        """``values`` (float32, blocks along the last axis) as ``operand`` says."""
        form = FORMATS[operand.format]
        if operand.scaling in ("mxfp8", "nvfp4"):
            return self._quantize_blocks(values, operand, kind)
        if operand.scaling == "delayed":
            return per_tensor(values, form, self._delayed_amax(values, kind))
        return per_tensor(values, form)

    def _quantize_blocks(self, values: Tensor, operand: Operand, kind: str) -> Quantized:
        """Block scales, zeros filling up the last block: they add nothing to a product."""
        rows, columns = values.shape
        below = -rows % NVFP4_BLOCK if operand.square else 0
        values = nn.functional.pad(values, (0, -columns % MXFP8_BLOCK, 0, below))
        if operand.scaling == "mxfp8":
            return mxfp8(values, FORMATS[operand.format])
        random = None
        if operand.stochastic:
            generator = self.state.generator(f"{self.name} {kind}")
            random = random_bytes(values.shape, generator).to(values.device)
        quantized = nvfp4(values, operand.square, random, operand.four_over_six)
        return Quantized(quantized.operand[:rows], quantized.scale)

    def weight_operand(self, operand: Operand, transposed: bool) -> Quantized:
        """The quantised weight ``[out, in]``, or its transpose, kept until the next iteration."""
        key = f"{operand} {transposed}"
        # Fused optimizers change a weight without counting up its version: the iteration tells.
        now = self.state.changes
        kept = self._kept.get(key)
        if kept is None or kept[0] != now or operand.scaling == "delayed":
            values = self.weight.detach().float()
            quantized = self.quantize(values.T if transposed else values, operand, "weight")
            self._kept[key] = kept = (now, quantized)
        return kept[1]

    def _delayed_amax(self, values: Tensor, kind: str) -> Tensor:
        """The largest magnitude of the steps before, noting this one's; that of this step where
        there is none before it. Repeating a step's forward pass changes nothing."""
        row = ("input", "weight", "gradient").index(kind.partition(" ")[0])
        history = self.amax_history[row]
        if self._noting and self.state.iteration != self._seen:
            self.amax_history.copy_(self.amax_history.roll(1, dims=1))
            self.amax_history[:, 0] = 0
            self._seen = self.state.iteration
        amax = values.abs().amax()
        before = history[1:].amax() if self._noting else history.amax()
        if self._noting:
            history[0] = torch.maximum(history[0], amax)
        return torch.where(before > 0, before, amax) * 2.0**self.recipe.margin


class _QuantizedProduct(torch.autograd.Function):
    """y = x W' and its two gradients, straight through the roundings (Bengio et al. 2013,
    arXiv 1308.3432): the gradient of a product of quantised operands, as if they were the originals."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.layer = layer
        rows = input.reshape(-1, layer.in_features)
        recipe = layer.recipe.forward
        if recipe is None:
            result = rows.bfloat16() @ weight.bfloat16().T
        else:
            left = layer.quantize(rows.float(), recipe[0], "input forward")
            result = product(left, layer.weight_operand(recipe[1], transposed=False))
        return result.float().reshape(*input.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        input, weight = ctx.saved_tensors
        layer: QuantizedLinear = ctx.layer
        layer._noting = True
        recipe = layer.recipe
        out = gradient.reshape(-1, layer.out_features)
        rows = input.reshape(-1, layer.in_features)
        if recipe.input_gradient is None:
            input_gradient = (out.bfloat16() @ weight.bfloat16()).float()
        else:
            left = layer.quantize(out.float(), recipe.input_gradient[0], "gradient input")
            right = layer.weight_operand(recipe.input_gradient[1], transposed=True)
            input_gradient = product(left, right)
        if recipe.weight_gradient is None:
            weight_gradient = (out.bfloat16().T @ rows.bfloat16()).float()
        else:
            by_token = [x.float().T.contiguous() for x in (out, rows)]
            if recipe.hadamard:
                pad = (0, -rows.shape[0] % NVFP4_BLOCK)
                by_token = [hadamard(nn.functional.pad(x, pad)) for x in by_token]
            left = layer.quantize(by_token[0], recipe.weight_gradient[0], "gradient weight")
            right = layer.quantize(by_token[1], recipe.weight_gradient[1], "input weight")
            weight_gradient = product(left, right)
        return input_gradient.to(input.dtype).reshape(input.shape), weight_gradient, None


def product(left: Quantized, right: Quantized) -> Tensor:
    """``left [M, K]`` times ``right [N, K]`` transposed, float32."""
    with _exact_in_bfloat16():
        accumulated = left.operand @ right.operand.T
    return accumulated * (left.scale * right.scale)


@contextmanager
def _exact_in_bfloat16() -> Iterator[None]:
    """Let float32 products run on the bfloat16 units: operands that are exact in it lose nothing."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
