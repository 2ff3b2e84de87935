"""Every scaling does as its entry says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conformance import generator
from quantized_layers import layer
from storylab.precision.recipes import (
    RECIPES,
    Operand,
)
from storylab.precision.rounding import round_nearest
from storylab.precision.scalings import SCALINGS, Scaling


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_every_scaling_keeps_its_word(scaling: Scaling) -> None:
    """Values are elements of the format times the unit that the scaling states, within its range."""
    quantized = layer(RECIPES["fp8"])
    x = torch.randn(40, 70, generator=generator(3)) * 10.0 ** torch.arange(-2, 3).repeat(14)
    for form in scaling.formats:
        operand = Operand(form, scaling)
        found = quantized.quantize(x, operand, "input", "any")
        assert len(found.operand) == 40 and not found.operand[:, 70:].any()
        assert torch.equal(found.operand.bfloat16().float(), found.operand)
        value = found.value[:, :70]
        units = scaling.units(x, operand, found.scale)[:40, :70]
        elements = value / units
        torch.testing.assert_close(elements, round_nearest(elements, form), rtol=1e-6, atol=0)
        assert (value - x).norm() < 1.1 * form.rel_error_bound * x.norm()
        assert scaling.bytes_per_element(form) >= form.bits / 8
        assert set(scaling.options) <= {f.name for f in dataclasses.fields(Operand)}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_a_transposable_tensor_is_quantized_as_its_transpose(scaling: Scaling) -> None:
    quantized = layer(RECIPES["fp8"])
    x = torch.randn(64, 64, generator=generator(3)) * 10.0 ** torch.arange(-1, 1).repeat(32)
    for square in {False, "square" in scaling.options}:
        operand = Operand(scaling.formats[0], scaling, square=square)
        straight = quantized.quantize(x, operand, "input", "any").value
        turned = quantized.quantize(x.T.contiguous(), operand, "input", "any").value
        assert torch.equal(straight.T, turned) == operand.transposable


def test_bytes_of_an_element_count_its_share_of_the_scale() -> None:
    found = {name: recipe.bytes_per_element for name, recipe in RECIPES.items()}
    assert found["fp8"] == found["fp8-current"] == found["fp8-rowwise"] == 1.0
    assert found["mxfp8"] == 1 + 1 / 32 and found["nvfp4"] == 0.5 + 1 / 16
