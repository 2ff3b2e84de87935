"""Element formats of low-precision tensors and the rounding onto them, exactly and on any device.

Values stay float32 tensors that hold nothing but values of the format. A format is one entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A floating-point format without infinities in use: what is too large saturates.

    Attributes:
        mantissa_bits: explicit ones.
        min_exponent: exponent of the smallest normal number; below it the steps stay equal.
        largest: greatest finite value.
        error: largest relative error of a tensor of normal draws rounded to it, with half as much
            again; the self-test's bound.
    """

    name: str
    mantissa_bits: int
    min_exponent: int
    largest: float
    error: float


# E4M3 and E5M2: OCP 8-bit Floating Point Specification, revision 1.0; E2M1: OCP Microscaling Formats
# (MX) Specification, version 1.0.
E4M3 = Format("e4m3", 3, -6, 448.0, 0.04)
E5M2 = Format("e5m2", 2, -14, 57344.0, 0.08)
E2M1 = Format("e2m1", 1, 0, 6.0, 0.16)
FORMATS = {form.name: form for form in (E4M3, E5M2, E2M1)}
# Random bits of stochastic rounding: what the hardware's conversion to E2M1 takes for each element.
RANDOM_BITS = 8


def steps(magnitudes: Tensor, form: Format) -> Tensor:
    """Distance between neighbours in the format at each of ``magnitudes`` (float32, not negative).

    The power of two below a magnitude is read off its bits, so that no logarithm can err.
    """
    exponents = (magnitudes.view(torch.int32) >> 23) - 127
    exponents = exponents.clamp(min=form.min_exponent) - form.mantissa_bits
    return ((exponents + 127) << 23).view(torch.float32)


def round_nearest(values: Tensor, form: Format) -> Tensor:
    """``values`` (float32) rounded to the format, ties to even, saturating; NaN stays NaN.

    torch's own casts agree in range, but what they do beyond it has changed between versions: E4M3
    saturates in 2.12 and gave NaN before, E5M2 overflows to infinity. Training hardware saturates.
    """
    clamped = values.clamp(-form.largest, form.largest)
    step = steps(clamped.abs(), form)
    # Division by a power of two is exact, and so is the product: the quotient has few bits.
    return torch.round(clamped / step) * step


def round_stochastic(values: Tensor, form: Format, random: Tensor) -> Tensor:
    """``values`` (float32) rounded up or down to the format by chance, saturating.

    Args:
        random: uint8 of the shape of ``values``, uniform.

    The chance to round up is the share of the step that the value is above its lower neighbour, to
    1/256 (rounded down), so that the mean is off by less than 1/256 of a step, toward zero.
    """
    clamped = values.clamp(-form.largest, form.largest)
    magnitudes = clamped.abs()
    step = steps(magnitudes, form)
    # The sum of the magnitude and a part of the step, cut down to the format: past the lower
    # neighbour's binade the next step is twice as long, so it is looked up again.
    moved = magnitudes + random.float() * (step / 2**RANDOM_BITS)
    step = steps(moved, form)
    cut = (torch.floor(moved / step) * step).clamp(max=form.largest)
    # A NaN has no sign bit worth keeping and stays one.
    return torch.copysign(cut, clamped)
