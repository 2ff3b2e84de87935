"""A linear layer whose three products read quantized operands, emulated exactly on any device.

Every product is a matrix product of operands that are exact in bfloat16, accumulated in float32 and
multiplied by the operands' scales afterwards. The hardware's matrix units compute the same, except for
the order of their additions and the bits that they truncate on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from storylab.precision.backends.protocol import PrecisionBackend
from storylab.precision.quantize import (
    HADAMARD_SIZE,
    Quantized,
    hadamard,
    hashed_bytes,
    padded,
    random_bytes,
    tensor_amax,
)
from storylab.precision.recipes import Operand, Recipe
from storylab.precision.state import QuantizationEvent, QuantizationState


class BackendLinear(nn.Module):
    """A linear layer without bias that a backend multiplies; ``weight`` is the original layer's.

    The library's own module is kept out of the module tree. Its private state, part of which is
    pickled, stays out of checkpoints, and parameters keep their names.
    """

    def __init__(
        self, layer: nn.Linear, backend: PrecisionBackend, state: QuantizationState
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.state = state
        self._kernel = (backend.layer(layer),)

    def forward(self, input: Tensor) -> Tensor:
        if not self.state.enabled:
            return nn.functional.linear(input, self.weight)
        output: Tensor = self._kernel[0](input)
        return output


@dataclass(frozen=True)
class LayerContext:
    """The :class:`TensorContext` of one tensor of a layer."""

    layer: QuantizedLinear
    kind: str
    use: str

    def delayed_amax(self, values: Tensor) -> Tensor:
        """Largest magnitude in earlier steps, see :meth:`QuantizedLinear.delayed_amax`."""
        return self.layer.delayed_amax(values, self.kind)

    def random_bytes(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Uniform uint8, made on a CUDA device where it is read there: a CPU takes longer to draw and
        copy the bytes of a gradient than the GPU takes to compute it."""
        seed = self.layer.state.draw_seed(
            f"{self.layer.name} {self.kind} {self.use}", shared=self.kind == "weight"
        )
        if device.type == "cuda":
            return hashed_bytes(shape, seed, device)
        return random_bytes(shape, torch.Generator().manual_seed(seed)).to(device)


class QuantizedLinear(nn.Module):
    """A linear layer without bias that multiplies by ``recipe``, emulated; weights stay float32.

    The history of delayed scales is in buffers, and so in checkpoints.
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
        self._cached: dict[tuple[Operand, bool, bool], tuple[tuple[int, ...], Quantized]] = {}
        if recipe.delayed:
            # Largest magnitudes of input, weight and output gradient. Column 0 is the iteration that
            # the other buffer names, which may be half done in a checkpoint; earlier ones follow.
            device = layer.weight.device
            self.register_buffer("amax_history", torch.zeros(3, recipe.history + 1, device=device))
            # On the host, which reads it for every tensor and would wait for a GPU each time.
            self.register_buffer("amax_iteration", torch.zeros((), dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        if not self.state.enabled:
            return nn.functional.linear(input, self.weight)
        device = input.device.type
        if torch.is_autocast_enabled(device):  # as the layer before would pass it on
            input = input.to(torch.get_autocast_dtype(device))
        self._training_pass = torch.is_grad_enabled()  # evaluation must not change training
        with torch.autocast(device, enabled=False):
            placeholder: Tensor = ProductOperands.apply(input, self.weight, self)
            output: Tensor = QuantizedProduct.apply(placeholder, input.detach(), self)
        return output

    def product(self, input: Tensor) -> Tensor:
        """The forward product ``[..., out]`` of ``input [..., in]``, in the dtype of ``input``."""
        rows = input.reshape(-1, self.in_features)
        recipe = self.recipe.forward
        if recipe is None or self.state.past(self.recipe.low_forward_share):
            result = rows.bfloat16() @ self.weight.detach().bfloat16().T
        else:
            left = self.quantize(rows, recipe[0], "input", "forward")
            result = product(left, self.weight_operand(recipe[1], transposed=False))
        return result.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def gradients(self, input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``input [..., in]`` (its dtype) and of the weight ``[out, in]`` (float32), given
        the output's, ``gradient [..., out]``."""
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
            if left is not None and recipe.shares_output_grad:
                left = left.T
            else:
                left = self._quantize_by_token(out, gradients, "gradient")
            right = self._quantize_by_token(rows, inputs, "input")
            weight_gradient = product(left, right)
        return input_gradient.to(input.dtype).view(input.shape), weight_gradient.float()

    def quantize(self, values: Tensor, operand: Operand, kind: str, use: str) -> Quantized:
        """Quantize ``values [M, K]`` by ``operand``, blocks along the last axis.

        Args:
            values: float32 or bfloat16.
            operand: how.
            kind: input, weight or gradient.
            use: the product that reads it.

        Returns:
            M rows and at least K columns; further columns are zeros.
        """
        quantized = operand.scaling.quantize(values, operand, LayerContext(self, kind, use))
        if self.state.on_quantize is not None and self._training_pass:
            event = QuantizationEvent(self.name, kind, use, values, operand, quantized)
            self.state.on_quantize(event)
        return quantized

    def _quantize_by_token(self, values: Tensor, operand: Operand, kind: str) -> Quantized:
        """Quantize ``values [M, K]`` as ``[K, M]`` for the weight gradient, which sums over tokens."""
        if operand.scaling.per_tensor and not self.recipe.hadamard:
            return self.quantize(values, operand, kind, "weight_gradient").T
        values = values.T.contiguous()
        if self.recipe.hadamard:
            values = hadamard(padded(values, HADAMARD_SIZE))
        return self.quantize(values, operand, kind, "weight_gradient")

    def weight_operand(self, operand: Operand, transposed: bool) -> Quantized:
        """The quantized weight ``[out, in]``, or its transpose, cached until the weights change."""
        if transposed and operand.transposable:
            straight = self.weight_operand(operand, transposed=False)
            return Quantized(straight.operand[:, : self.in_features], straight.scale).T
        # Fused optimizers change a weight without counting up torch's own version of it.
        now: tuple[int, ...] = (self.state.weights_version,)
        if operand.scaling.delayed:  # depends on the steps before this one
            now = (*now, self.state.iteration)
        # Evaluation has its own entry, as it must not change training.
        key = (operand, transposed, self._training_pass)
        version, quantized = self._cached.get(key, (None, None))
        if quantized is None or version != now:
            values = self.weight.detach()
            if transposed:
                values = values.T.contiguous()
            use = "input_gradient" if transposed else "forward"
            quantized = self.quantize(values, operand, "weight", use)
            self._cached[key] = (now, quantized)
        return quantized

    def delayed_amax(self, values: Tensor, kind: str) -> Tensor:
        """Largest magnitude of a tensor in earlier steps (float32 scalar), times 2^margin; this
        step's if there is no earlier one.

        A training pass also notes this step's. Repeating a step's forward pass changes nothing.
        """
        history = self.amax_history[("input", "weight", "gradient").index(kind)]
        amax, noted = tensor_amax(values), int(self.amax_iteration)
        if self._training_pass:
            if noted != self.state.iteration:
                self.amax_history.copy_(self.amax_history.roll(1, dims=1))
                self.amax_history[:, 0] = 0
                self.amax_iteration.fill_(self.state.iteration)
            history[0] = torch.maximum(history[0], amax)
        # Evaluation follows the finished iteration, whether or not the next one has begun.
        begun = self._training_pass or noted > self.state.iteration
        before = (history[1:] if begun else history[:-1]).amax()
        return torch.where(before > 0, before, amax) * 2.0**self.recipe.margin


class ProductOperands(torch.autograd.Function):
    """Saves the operands of a product for the backward pass, and computes its gradients.

    The gradient is straight-through (Bengio et al. 2013, arXiv 1308.3432): rounding counts as the
    identity. This function is separate from the product so that a recomputed forward pass
    (activation checkpointing) stops here, before the product, as it does with torch's linear layer.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.layer = layer
        # A placeholder of the product's shape that takes one element of memory.
        return input.new_zeros(()).expand(*input.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacking both lets torch notice a weight that has changed since.
        input, _ = ctx.saved_tensors
        return *ctx.layer.gradients(input, gradients[0]), None


class QuantizedProduct(torch.autograd.Function):
    """The product itself; passes its gradient on to :class:`ProductOperands`."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, input: Tensor, layer: QuantizedLinear) -> Tensor:
        return layer.product(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None


def product(left: Quantized, right: Quantized) -> Tensor:
    """``left [M, K]`` times ``right [N, K]`` transposed: ``[M, N]`` float32.

    If one has more columns than the other, the additional columns are padding.
    """
    columns = min(left.operand.shape[1], right.operand.shape[1])
    with _exact_in_bfloat16():
        accumulated = left.operand[:, :columns] @ right.operand[:, :columns].T
    across = right.scale if right.scale.dim() == 0 else right.scale.T
    return accumulated.mul_(left.scale * across)


@contextmanager
def _exact_in_bfloat16() -> Iterator[None]:
    """Run float32 products on the bfloat16 units; operands that are exact in bfloat16 lose nothing."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
