"""Statistics of quantized tensors against counts by hand."""

from __future__ import annotations

import pytest
import torch

from conformance import generator
from quantized_layers import layer
from storylab.precision.quantize import (
    nvfp4,
)
from storylab.precision.recipes import (
    RECIPES,
)
from storylab.precision.stats import QuantizationStatistics


def test_what_happens_to_a_tensor_is_measured() -> None:
    quantized = layer(RECIPES["nvfp4"])
    statistics = QuantizationStatistics()
    x = torch.randn(64, 64, generator=generator(1))
    x[:, 16:32] *= 1e-6  # blocks that the tensor's and the block's scale cannot both reach
    x.requires_grad_()
    with quantized.state.observed(statistics):
        quantized(x).backward(torch.randn(64, 96, generator=generator(2)))
        with torch.no_grad():
            quantized(x)  # evaluation is not training
    rows = {(row["tensor"], row["product"]): row for row in statistics.rows()}
    assert set(rows) == {
        ("input", "forward"),
        ("weight", "forward"),
        ("gradient", "input_gradient"),
        ("gradient", "weight_gradient"),
        ("input", "weight_gradient"),
    }
    found = rows["input", "forward"]
    x = x.detach()
    value = nvfp4(x).value
    assert found["error"] == pytest.approx(float((value - x).norm() / x.norm()), rel=1e-5)
    assert found["underflow"] == pytest.approx(float((value == 0).float().mean()), abs=1e-6)
    assert found["underflow"] > 0.25 and found["scale_low"] < found["scale_high"]
    assert found["saturation"] < 0.1
