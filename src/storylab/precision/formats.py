"""Element formats of low-precision tensors: the facts. :mod:`storylab.precision.rounding` has the numerics.

A format is one entry of :data:`FORMATS`. This module does not load torch, so that plans can read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MatrixUnit = Literal["bfloat16", "fp8", "fp4"]


@dataclass(frozen=True)
class Format:
    """A floating-point format used without infinities: larger values saturate.

    Attributes:
        name: as ``--recipe`` spells it.
        bits: bits of an element.
        mantissa_bits: explicit ones.
        min_exponent: exponent of the smallest normal number; below it the spacing is constant.
        max: greatest finite value.
        rel_error_bound: bound on the relative error (norm of the error over norm of the tensor) of
            rounding N(0, 1) data: 1.5 to 1.7 times the measured error. The self-test uses it.
        matrix_unit: the rate of a GPU at which products of this format run.
    """

    name: str
    bits: int
    mantissa_bits: int
    min_exponent: int
    max: float
    rel_error_bound: float
    matrix_unit: MatrixUnit


# E4M3 and E5M2: OCP 8-bit Floating Point Specification, revision 1.0; E2M1: OCP Microscaling Formats
# (MX) Specification, version 1.0.
E4M3 = Format("e4m3", 8, 3, -6, 448.0, 0.04, "fp8")
E5M2 = Format("e5m2", 8, 2, -14, 57344.0, 0.08, "fp8")
E2M1 = Format("e2m1", 4, 1, 0, 6.0, 0.16, "fp4")
FORMATS = {form.name: form for form in (E4M3, E5M2, E2M1)}
