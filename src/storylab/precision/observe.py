"""What quantisation does to the tensors of a model while it trains, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from storylab.precision.formats import FORMATS
from storylab.precision.linear import Observed
from storylab.precision.quantize import (
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    largest_magnitude,
    mxfp8_exponents,
    nvfp4_encode,
    nvfp4_scales,
    padded,
)
from storylab.precision.recipes import Operand


class QuantizationStatistics:
    """Gathers what it is told of quantised tensors: means over the micro-batches of an iteration."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str], list[Tensor]] = {}

    def __call__(self, observed: Observed) -> None:
        """Take in one tensor."""
        key = (observed.layer, observed.kind, observed.use)
        self._seen.setdefault(key, []).append(measure(observed))

    def rows(self) -> Iterator[dict[str, Any]]:
        """For each layer, tensor kind and product: ``error``, ``underflow``, ``saturation``,
        ``scale_low`` and ``scale_high``, as :func:`measure` has them."""
        for (layer, kind, use), seen in self._seen.items():
            values = torch.stack(seen).mean(dim=0).tolist()
            names = ("error", "underflow", "saturation", "scale_low", "scale_high")
            yield {"layer": layer, "tensor": kind, "product": use} | dict(
                zip(names, values, strict=True)
            )


def measure(observed: Observed) -> Tensor:
    """What quantisation did to one tensor, five float32 numbers.

    The norm of the error over that of the tensor; the share of its non-zero values that became zero;
    the share beyond the format's largest value at their scale; and the binary logarithms of the
    smallest and largest scale of a block that is not all zeros.
    """
    rows, columns = observed.values.shape
    values = observed.values.float()
    quantized = observed.quantized.value[:, :columns]
    norm, nonzero = values.norm(), values != 0
    error = (quantized - values).norm() / norm if norm > 0 else norm
    underflow = (nonzero & (quantized == 0)).sum() / nonzero.sum().clamp(min=1)
    units = _units(observed.values.float(), observed.operand, observed.quantized.scale)
    units = units[:rows, :columns]
    # Where the scale itself became zero, that is underflow.
    beyond = (units > 0) & (values.abs() > units * FORMATS[observed.operand.format].largest)
    used = units[nonzero & (units > 0)]
    low, high = torch.aminmax(used.log2()) if used.numel() else (norm * 0, norm * 0)
    return torch.stack((error, underflow, beyond.float().mean(), low, high)).cpu()


def _units(values: Tensor, operand: Operand, scale: Tensor) -> Tensor:
    """What one unit of the element format stands for at each place of ``values [M, K]``; the result
    may be larger, by filling. A block scaled to four instead of six counts as scaled to six."""
    if operand.whole_tensor or operand.scaling == "row":
        return scale.expand_as(values)
    values = padded(values, MXFP8_BLOCK, NVFP4_BLOCK if operand.square else 1)
    if operand.scaling == "mxfp8":
        exponents = mxfp8_exponents(values.reshape(-1, MXFP8_BLOCK), FORMATS[operand.format])
        return torch.exp2(exponents).expand(-1, MXFP8_BLOCK).reshape(values.shape)
    encode = nvfp4_encode(largest_magnitude(values))
    height = NVFP4_BLOCK if operand.square else 1
    blocks = values.view(-1, height, values.shape[1] // NVFP4_BLOCK, NVFP4_BLOCK)
    scales = nvfp4_scales(blocks.abs().amax(dim=(1, 3), keepdim=True), encode, 6.0)
    return (scales * scale).expand_as(blocks).reshape(values.shape)
