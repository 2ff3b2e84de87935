"""Statistics of quantization while a model trains, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from storylab.precision.state import QuantizationEvent


class QuantizationStatistics:
    """Collects events; reports means over the micro-batches of an iteration."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str], list[Tensor]] = {}

    def __call__(self, event: QuantizationEvent) -> None:
        """Add one tensor."""
        key = (event.layer, event.kind, event.use)
        self._seen.setdefault(key, []).append(measure(event))

    def rows(self) -> Iterator[dict[str, Any]]:
        """For each layer, tensor kind and product: ``error``, ``underflow``, ``saturation``,
        ``scale_low`` and ``scale_high``, as :func:`measure` defines them."""
        for (layer, kind, use), seen in self._seen.items():
            values = torch.stack(seen).mean(dim=0).tolist()
            names = ("error", "underflow", "saturation", "scale_low", "scale_high")
            yield {"layer": layer, "tensor": kind, "product": use} | dict(
                zip(names, values, strict=True)
            )


def measure(event: QuantizationEvent) -> Tensor:
    """Five float32 numbers about one quantized tensor.

    In order: the norm of the error over the norm of the tensor; the share of its non-zero values that
    became zero; the share of values beyond the format's maximum at their scale; and the binary
    logarithms of the smallest and the largest scale of a block that is not all zeros.
    """
    rows, columns = event.values.shape
    values = event.values.float()
    quantized = event.quantized.value[:, :columns]
    norm, nonzero = values.norm(), values != 0
    error = (quantized - values).norm() / norm if norm > 0 else norm
    underflow = (nonzero & (quantized == 0)).sum() / nonzero.sum().clamp(min=1)
    operand = event.operand
    units = operand.scaling.units(values, operand, event.quantized.scale)[:rows, :columns]
    # A scale that became zero itself counts as underflow.
    beyond = (units > 0) & (values.abs() > units * operand.format.max)
    used = units[nonzero & (units > 0)]
    low, high = torch.aminmax(used.log2()) if used.numel() else (norm * 0, norm * 0)
    return torch.stack((error, underflow, beyond.float().mean(), low, high)).cpu()
