"""Layers in low precision, for tests."""

from __future__ import annotations

from torch import nn

from conformance import generator
from storylab.precision.linear import QuantizedLinear
from storylab.precision.recipes import (
    Recipe,
)
from storylab.precision.state import QuantizationState


def layer(recipe: Recipe, seed: int = 0) -> QuantizedLinear:
    plain = nn.Linear(64, 96, bias=False)
    nn.init.normal_(plain.weight, generator=generator(seed))
    return QuantizedLinear(plain, recipe, QuantizationState(seed, max_iters=10), "layer")
