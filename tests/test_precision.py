"""Low precision: formats against ml_dtypes, quantisers against TransformerEngine's own reference,
products against float64, gradients against the straight-through expression."""

from __future__ import annotations

import enum
import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storylab.precision.formats import E2M1, E4M3, E5M2, FORMATS, Format, round_nearest, round_stochastic
from storylab.precision.quantize import hadamard, mxfp8, nvfp4, per_tensor, random_bytes

ml_dtypes = pytest.importorskip("ml_dtypes")
REFERENCES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def values_of(form: Format) -> np.ndarray:
    """Every finite value of a format, in order, as ml_dtypes has them."""
    codes = np.arange(16 if form is E2M1 else 256, dtype=np.uint8)
    values = codes.view(REFERENCES[form.name]).astype(np.float32)
    return np.unique(values[np.isfinite(values)])


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_rounding_is_that_of_ml_dtypes(form: Format) -> None:
    """On every value, every midpoint and its neighbours, and two million draws of every magnitude."""
    values = values_of(form)
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    draws = rng.standard_normal(2_000_000) * 10.0 ** rng.uniform(-10, 5, 2_000_000)
    x = np.concatenate(
        (values, middles, np.nextafter(middles, np.float32(math.inf)), np.nextafter(middles, np.float32(-math.inf)), draws)
    ).astype(np.float32).clip(-form.largest, form.largest)
    reference = x.astype(REFERENCES[form.name]).astype(np.float32)
    ours = round_nearest(torch.from_numpy(x), form).numpy()
    assert np.array_equal(ours, reference)
    assert np.array_equal(np.signbit(ours), np.signbit(reference))
