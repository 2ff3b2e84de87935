"""Scalings: how the elements of a tensor share scales. A scaling is one class here.

A scaling owns all its facts: how it quantizes, which value one unit of the element format
represents at each place, which GPU feature and which shapes it needs, and how many bytes an element
takes. This module does not load torch: plans read the facts, and the methods that compute on
tensors import their kernels (:mod:`storylab.precision.quantize`) when they are called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

from storylab.precision.features import FP8, MXFP8, NVFP4, Feature
from storylab.precision.formats import E2M1, E4M3, E5M2, Format

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from storylab.precision.quantize import Quantized
    from storylab.precision.recipes import Operand

# Sides of the blocks of the two block scalings.
MXFP8_BLOCK, NVFP4_BLOCK = 32, 16


class TensorContext(Protocol):
    """The layer's answers to the scaling that quantizes its tensor."""

    def delayed_amax(self, values: Tensor) -> Tensor:
        """Largest magnitude of this tensor in earlier steps (float32 scalar), noting this step's."""
        ...

    def random_bytes(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Uniform uint8 of ``shape``, a new draw at every call."""
        ...


class Scaling(ABC):
    """How scales are shared, computed and stored.

    Attributes:
        name: as ``--recipe`` spells it.
        formats: element formats that it takes.
        options: names of the options of :class:`Operand` that it takes.
        feature: the GPU feature that multiplies its operands.
        alignment: tokens of a sequence and features of a layer must be multiples of this in hardware.
        scale_bytes: bytes of scales per element; 0 where a scale covers a row or a tensor.
        per_tensor: one scale covers the tensor, so that its transpose has the same values.
        delayed: the scale comes from earlier steps.
    """

    name: ClassVar[str]
    formats: ClassVar[tuple[Format, ...]] = (E4M3, E5M2)
    options: ClassVar[frozenset[str]] = frozenset()
    feature: ClassVar[Feature] = FP8
    alignment: ClassVar[int] = 16
    scale_bytes: ClassVar[float] = 0.0
    per_tensor: ClassVar[bool] = False
    delayed: ClassVar[bool] = False

    @abstractmethod
    def quantize(self, values: Tensor, operand: Operand, context: TensorContext) -> Quantized:
        """Quantize ``values [M, K]`` (float32 or bfloat16), blocks along the last axis.

        The result has M rows and may have more than K columns; further columns are zeros.
        """

    @abstractmethod
    def units(self, values: Tensor, operand: Operand, scale: Tensor) -> Tensor:
        """Value of one unit of the element format at each place of ``values [M, K]`` (float32).

        Args:
            values: the tensor before quantization.
            operand: how it was quantized.
            scale: the float32 scale that :meth:`quantize` returned.

        Returns:
            At least ``[M, K]``, float32; further rows and columns are padding.
        """

    def transposable(self, operand: Operand) -> bool:
        """Whether the transpose of a quantized tensor is the quantized transpose."""
        return self.per_tensor

    def bytes_per_element(self, form: Format) -> float:
        """Bytes of an element in memory, its share of the block scale included."""
        return form.bits / 8 + self.scale_bytes


class PerTensor(Scaling):
    """One scale for the tensor, from its own largest magnitude (TransformerEngine's
    Float8CurrentScaling, torchao's "tensorwise")."""

    name = "tensor"
    per_tensor = True

    def quantize(self, values: Tensor, operand: Operand, context: TensorContext) -> Quantized:
        from storylab.precision.quantize import per_tensor

        return per_tensor(values, operand.format)

    def units(self, values: Tensor, operand: Operand, scale: Tensor) -> Tensor:
        return scale.expand_as(values)


class Delayed(PerTensor):
    """One scale for the tensor, from the largest magnitude of earlier steps (TransformerEngine's
    DelayedScaling)."""

    name = "delayed"
    delayed = True

    def quantize(self, values: Tensor, operand: Operand, context: TensorContext) -> Quantized:
        from storylab.precision.quantize import per_tensor

        return per_tensor(values, operand.format, context.delayed_amax(values))


class PerRow(Scaling):
    """One power-of-two scale for each row (torchao's "rowwise")."""

    name = "row"

    def quantize(self, values: Tensor, operand: Operand, context: TensorContext) -> Quantized:
        from storylab.precision.quantize import per_row

        return per_row(values, operand.format)

    def units(self, values: Tensor, operand: Operand, scale: Tensor) -> Tensor:
        return scale.expand_as(values)


class Mxfp8(Scaling):
    """A power-of-two scale (E8M0, one byte) for every 32 elements along a row."""

    name = "mxfp8"
    feature = MXFP8
    alignment = MXFP8_BLOCK
    scale_bytes = 1 / MXFP8_BLOCK

    def quantize(self, values: Tensor, operand: Operand, context: TensorContext) -> Quantized:
        from storylab.precision.quantize import mxfp8, padded

        return mxfp8(padded(values, MXFP8_BLOCK), operand.format)

    def units(self, values: Tensor, operand: Operand, scale: Tensor) -> Tensor:
        from storylab.precision.quantize import mxfp8_exponents, padded

        values = padded(values, MXFP8_BLOCK)
        exponents = mxfp8_exponents(values.reshape(-1, MXFP8_BLOCK), operand.format)
        return exponents.exp2().expand(-1, MXFP8_BLOCK).reshape(values.shape)


class Nvfp4(Scaling):
    """An E4M3 scale (one byte) for every 16 elements along a row, or for every 16 x 16 elements, and a
    float32 scale for the tensor."""

    name = "nvfp4"
    formats = (E2M1,)
    options = frozenset({"square", "stochastic", "four_over_six"})
    feature = NVFP4
    scale_bytes = 1 / NVFP4_BLOCK

    def quantize(self, values: Tensor, operand: Operand, context: TensorContext) -> Quantized:
        from storylab.precision.quantize import Quantized, nvfp4

        rows = len(values)
        values = self._padded(values, operand)
        random = None
        if operand.stochastic:
            random = context.random_bytes(values.shape, values.device)
        quantized = nvfp4(values, operand.square, random, operand.four_over_six)
        return Quantized(quantized.operand[:rows], quantized.scale)

    def units(self, values: Tensor, operand: Operand, scale: Tensor) -> Tensor:
        """As above; a block scaled to 4 instead of 6 counts as scaled to 6."""
        from storylab.precision.quantize import global_encode_scale, nvfp4_scales, tensor_amax

        values = self._padded(values, operand)
        encode = global_encode_scale(tensor_amax(values))
        height = NVFP4_BLOCK if operand.square else 1
        blocks = values.view(-1, height, values.shape[1] // NVFP4_BLOCK, NVFP4_BLOCK)
        scales = nvfp4_scales(blocks.abs().amax(dim=(1, 3), keepdim=True), encode, E2M1.max)
        return (scales * scale).expand_as(blocks).reshape(values.shape)

    def transposable(self, operand: Operand) -> bool:
        return operand.square

    @staticmethod
    def _padded(values: Tensor, operand: Operand) -> Tensor:
        from storylab.precision.quantize import padded

        # As many columns as MXFP8 has, so that the two can meet in a product.
        return padded(values, MXFP8_BLOCK, NVFP4_BLOCK if operand.square else 1)


DELAYED, PER_TENSOR, PER_ROW = Delayed(), PerTensor(), PerRow()
MXFP8_SCALING, NVFP4_SCALING = Mxfp8(), Nvfp4()
SCALINGS: dict[str, Scaling] = {
    scaling.name: scaling
    for scaling in (DELAYED, PER_TENSOR, PER_ROW, MXFP8_SCALING, NVFP4_SCALING)
}
