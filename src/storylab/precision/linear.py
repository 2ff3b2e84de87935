"""A linear layer whose three products see quantised operands, emulated exactly on any device.

Every product is a matrix product of operands that are exact in bfloat16, accumulated in float32, and
multiplied by the operands' scales afterwards: what the matrix units of the hardware compute, but for the
order in which they add up and what they cut off on the way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from storylab.precision.formats import FORMATS
from storylab.precision.quantize import (
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    Quantized,
    hadamard,
    largest_magnitude,
    mxfp8,
    nvfp4,
    padded,
    per_row,
    per_tensor,
    random_bytes,
)
from storylab.precision.recipes import Operand, Recipe


class Observed(NamedTuple):
    """A tensor that training has quantised: in which layer, what it is, for which product."""

    layer: str
    kind: str
    use: str
    values: Tensor
    operand: Operand
    quantized: Quantized


@dataclass
class QuantizationState:
    """What the quantised layers of a model share: where training stands, and whether they quantise."""

    seed: int
    max_iters: int
    enabled: bool = True
    iteration: int = 0
    weights_version: int = 0
    """Counts up whenever the weights may have changed."""
    draws: dict[str, int] = field(default_factory=dict)
    watch: Callable[[Observed], None] | None = None
    """Told of every tensor that is quantised for training, while there is one."""

    def advance(self, iteration: int) -> None:
        """Go to ``iteration``: its random draws do not depend on what came before."""
        self.iteration = iteration
        self.draws.clear()

    def weights_changed(self) -> None:
        """What was quantised of the weights is to be made anew."""
        self.weights_version += 1

    def past(self, share: float) -> bool:
        """Whether more than this share of the iterations is done."""
        return self.iteration > share * self.max_iters

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The layers compute as if they had no recipe while the block runs."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    @contextmanager
    def watched(self, watch: Callable[[Observed], None]) -> Iterator[None]:
        """Tell ``watch`` of every tensor that training quantises while the block runs."""
        self.watch = watch
        try:
            yield
        finally:
            self.watch = None

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
    amax_iteration: Tensor

    def __init__(
        self, layer: nn.Linear, recipe: Recipe, state: QuantizationState, name: str
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.recipe, self.state, self.name = recipe, state, name
        self._training_pass = False
        self._kept: dict[tuple[Operand, bool, bool], tuple[tuple[int, ...], Quantized]] = {}
        if recipe.delayed:
            # Largest magnitudes of input, weight and output gradient: those of the iteration that the
            # other buffer names, perhaps half done when a checkpoint is written, then those before.
            device = layer.weight.device
            self.register_buffer("amax_history", torch.zeros(3, recipe.history + 1, device=device))
            self.register_buffer(
                "amax_iteration", torch.zeros((), dtype=torch.int64, device=device)
            )

    def forward(self, input: Tensor) -> Tensor:
        if not self.state.enabled:
            return nn.functional.linear(input, self.weight)
        device = input.device.type
        if torch.is_autocast_enabled(device):  # what the layer before hands on in mixed precision
            input = input.to(torch.get_autocast_dtype(device))
        self._training_pass = torch.is_grad_enabled()  # evaluation must leave no trace in training
        with torch.autocast(device, enabled=False):
            promise: Tensor = _Operands.apply(input, self.weight, self)
            output: Tensor = _Product.apply(promise, input.detach(), self)
        return output

    def product(self, input: Tensor) -> Tensor:
        """The forward product, in the dtype of ``input``."""
        rows = input.reshape(-1, self.in_features)
        recipe = self.recipe.forward
        if recipe is None or self.state.past(self.recipe.low_forward_share):
            result = rows.bfloat16() @ self.weight.detach().bfloat16().T
        else:
            left = self.quantize(rows, recipe[0], "input", "forward")
            result = product(left, self.weight_operand(recipe[1], transposed=False))
        return result.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def gradients(self, input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of input and weight, given that of the output."""
        self._training_pass = True
        recipe = self.recipe
        rows = input.reshape(-1, self.in_features)
        out = gradient.reshape(-1, self.out_features)
        left = None
        if recipe.input_gradient is None:
            input_gradient = out.bfloat16() @ self.weight.detach().bfloat16()
        else:
            left = self.quantize(out, recipe.input_gradient[0], "gradient", "input_gradient")
            right = self.weight_operand(recipe.input_gradient[1], transposed=True)
            input_gradient = product(left, right)
        if recipe.weight_gradient is None:
            weight_gradient = out.bfloat16().T @ rows.bfloat16()
        else:
            gradients, inputs = recipe.weight_gradient
            if left is not None and recipe.one_gradient:
                left = left.T  # one scale whichever way it lies
            else:
                left = self._quantize_by_token(out, gradients, "gradient")
            right = self._quantize_by_token(rows, inputs, "input")
            weight_gradient = product(left, right)
        return input_gradient.to(input.dtype).view(input.shape), weight_gradient.float()

    def quantize(self, values: Tensor, operand: Operand, kind: str, use: str) -> Quantized:
        """``values [M, K]`` as ``operand`` says, blocks along the last axis; the result may have more
        columns, of zeros. ``kind`` is input, weight or gradient and ``use`` the product."""
        form = FORMATS[operand.format]
        if operand.scaling == "delayed":
            quantized = per_tensor(values, form, self._delayed_amax(values, kind))
        elif operand.scaling == "tensor":
            quantized = per_tensor(values, form)
        elif operand.scaling == "row":
            quantized = per_row(values, form)
        elif operand.scaling == "mxfp8":
            quantized = mxfp8(padded(values, MXFP8_BLOCK), form)
        else:
            quantized = self._quantize_nvfp4(values, operand, f"{kind} {use}")
        if self.state.watch is not None and self._training_pass:
            self.state.watch(Observed(self.name, kind, use, values, operand, quantized))
        return quantized

    def _quantize_by_token(self, values: Tensor, operand: Operand, kind: str) -> Quantized:
        """``values [M, K]`` turned to ``[K, M]`` for the weight gradient, which sums over tokens."""
        if operand.whole_tensor and not self.recipe.hadamard:
            return self.quantize(values, operand, kind, "weight_gradient").T
        values = values.T.contiguous()
        if self.recipe.hadamard:
            values = hadamard(padded(values, NVFP4_BLOCK))
        return self.quantize(values, operand, kind, "weight_gradient")

    def _quantize_nvfp4(self, values: Tensor, operand: Operand, draw: str) -> Quantized:
        rows = len(values)
        # As many columns as MXFP8 has, so that the two can meet in a product.
        values = padded(values, MXFP8_BLOCK, NVFP4_BLOCK if operand.square else 1)
        random = None
        if operand.stochastic:
            generator = self.state.generator(f"{self.name} {draw}")
            random = random_bytes(values.shape, generator).to(values.device)
        quantized = nvfp4(values, operand.square, random, operand.four_over_six)
        return Quantized(quantized.operand[:rows], quantized.scale)

    def weight_operand(self, operand: Operand, transposed: bool) -> Quantized:
        """The quantised weight ``[out, in]``, or its transpose, kept until the weights change."""
        if transposed and (operand.whole_tensor or operand.square):
            kept = self.weight_operand(operand, transposed=False)
            return Quantized(kept.operand[:, : self.in_features], kept.scale).T
        # Fused optimizers change a weight without counting up its own version.
        # Evaluation has its own: it must leave no trace in training.
        now: tuple[int, ...] = (self.state.weights_version,)
        if operand.scaling == "delayed":  # made from the steps before this one
            now = (*now, self.state.iteration)
        key = (operand, transposed, self._training_pass)
        version, quantized = self._kept.get(key, (None, None))
        if quantized is None or version != now:
            values = self.weight.detach()
            if transposed:
                values = values.T.contiguous()
            use = "input_gradient" if transposed else "forward"
            quantized = self.quantize(values, operand, "weight", use)
            self._kept[key] = (now, quantized)
        return quantized

    def _delayed_amax(self, values: Tensor, kind: str) -> Tensor:
        """The largest magnitude of the steps before, noting this one's; that of this step where
        there is none before it. Repeating a step's forward pass changes nothing."""
        history = self.amax_history[("input", "weight", "gradient").index(kind)]
        amax, noted = largest_magnitude(values), int(self.amax_iteration)
        if self._training_pass:
            if noted != self.state.iteration:
                self.amax_history.copy_(self.amax_history.roll(1, dims=1))
                self.amax_history[:, 0] = 0
                self.amax_iteration.fill_(self.state.iteration)
            history[0] = torch.maximum(history[0], amax)
        # Evaluation follows the iteration that is done, whether or not the next one has been begun.
        begun = self._training_pass or noted > self.state.iteration
        before = (history[1:] if begun else history[:-1]).amax()
        return torch.where(before > 0, before, amax) * 2.0**self.recipe.margin


class _Operands(torch.autograd.Function):
    """Remembers what a product is made of, and makes its gradients: straight through the roundings
    (Bengio et al. 2013, arXiv 1308.3432), as if the quantised operands were the originals.

    It is apart from the product so that a forward pass that is redone for its gradients ends
    here, before the product, as it does with torch's own linear layer.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.layer = layer
        # As large as the product to look at, and one element in memory.
        return input.new_zeros(()).expand(*input.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, _ = ctx.saved_tensors  # read as one, so that a weight changed since is noticed
        return *ctx.layer.gradients(input, gradients[0]), None


class _Product(torch.autograd.Function):
    """The product itself; its gradient goes to :class:`_Operands`."""

    @staticmethod
    def forward(ctx: Any, promise: Tensor, input: Tensor, layer: QuantizedLinear) -> Tensor:
        return layer.product(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None


def product(left: Quantized, right: Quantized) -> Tensor:
    """``left [M, K]`` times ``right [N, K]`` transposed, float32. What one has more columns than the
    other is filling."""
    columns = min(left.operand.shape[1], right.operand.shape[1])
    with _exact_in_bfloat16():
        accumulated = left.operand[:, :columns] @ right.operand[:, :columns].T
    across = right.scale if right.scale.dim() == 0 else right.scale.T
    return accumulated.mul_(left.scale * across)


@contextmanager
def _exact_in_bfloat16() -> Iterator[None]:
    """Let float32 products run on the bfloat16 units: operands that are exact in it lose nothing."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
