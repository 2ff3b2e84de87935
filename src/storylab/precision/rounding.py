"""Rounding onto the element formats, exact on any device.

Results are float32 tensors whose values all belong to the format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from storylab.precision.formats import Format

# Random bits per element of stochastic rounding, as many as the hardware's conversion to E2M1 takes.
RANDOM_BITS = 8


def ulp(magnitudes: Tensor, form: Format) -> Tensor:
    """Spacing of the format's values at each of ``magnitudes`` (float32, not negative).

    The exponent is read from the bits, so that no rounding error of a logarithm can enter.
    """
    exponents = (magnitudes.view(torch.int32) >> 23) - 127
    exponents = exponents.clamp(min=form.min_exponent) - form.mantissa_bits
    return ((exponents + 127) << 23).view(torch.float32)


def round_nearest(values: Tensor, form: Format) -> Tensor:
    """Round ``values`` (float32) to the format, ties to even, saturating; NaN stays NaN.

    torch's own casts agree within the format's range, but differ between versions beyond it: E4M3
    saturates in 2.12 and gave NaN before, E5M2 overflows to infinity. Training hardware saturates.
    """
    clamped = values.clamp(-form.max, form.max)
    step = ulp(clamped.abs(), form)
    # Division by a power of two is exact, and so is the product: the quotient has few bits.
    return torch.round(clamped / step) * step


def stochastic_round(values: Tensor, form: Format, random: Tensor) -> Tensor:
    """Round ``values`` (float32) up or down to the format at random, saturating.

    Args:
        values: float32, any shape.
        form: the format.
        random: uint8 of the shape of ``values``, uniform.

    The probability to round up is the distance to the lower neighbour in units of the spacing,
    rounded down to 1/256. The mean is therefore off by less than 1/256 of a step, toward zero.
    """
    clamped = values.clamp(-form.max, form.max)
    magnitudes = clamped.abs()
    step = ulp(magnitudes, form)
    # Add a random part of the step, then truncate. The sum may reach the next binade, where the
    # step is twice as long, so the step is looked up again.
    moved = magnitudes + random.float() * (step / 2**RANDOM_BITS)
    step = ulp(moved, form)
    cut = (torch.floor(moved / step) * step).clamp(max=form.max)
    # NaN carries no sign worth keeping and stays NaN.
    return torch.copysign(cut, clamped)
