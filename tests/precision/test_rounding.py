"""Rounding to a format, to the nearest value and at random."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import conformance
from conformance import generator
from storylab.precision.formats import FORMATS, Format
from storylab.precision.quantize import (
    random_bytes,
)
from storylab.precision.rounding import round_nearest, stochastic_round


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_the_facts_of_a_format_are_those_of_another_library(form: Format) -> None:
    """Bits, and the error of normal data, scaled to the format's range: FP4 in NVFP4's blocks of 16."""
    try:
        kind = conformance.reference_type(form)
    except conformance.OracleMissingError as missing:
        pytest.skip(f"{missing} is not installed")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert form.bits == ml_dtypes.finfo(kind).bits
    x = np.random.default_rng(0).standard_normal((10_000, 16) if form.bits == 4 else (1, 160_000))
    scaled = x * (form.max / np.abs(x).max(axis=1, keepdims=True))
    error = scaled.astype(np.float32).astype(kind).astype(np.float64) - scaled
    relative = np.linalg.norm(error * x / scaled) / np.linalg.norm(x)
    assert 1.4 < form.rel_error_bound / relative < 1.8


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_what_is_too_large_saturates_and_a_nan_stays(form: Format) -> None:
    x = torch.tensor([math.inf, -math.inf, 1e30, math.nan])
    rounded = round_nearest(x, form)
    assert rounded[:3].tolist() == [form.max, -form.max, form.max]
    assert rounded[3].isnan()


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_stochastic_rounding_gives_neighbours_and_keeps_the_mean(form: Format) -> None:
    try:
        values = torch.from_numpy(conformance.values_of(form))
    except conformance.OracleMissingError as missing:
        pytest.skip(f"{missing} is not installed")
    x = torch.empty(500).uniform_(-1, 1, generator=generator(0)) * form.max
    below = values[torch.searchsorted(values, x, right=True) - 1]
    above = values[torch.searchsorted(values, x).clamp(max=len(values) - 1)]
    draws = 4000
    random = random_bytes(torch.Size((draws, 500)), generator(1))
    rounded = stochastic_round(x.expand(draws, -1), form, random)
    assert ((rounded == below) | (rounded == above)).all()
    step = (above - below).clamp(min=1e-30)
    error = (rounded.mean(dim=0) - x) / step
    # Toward zero by at most 1/256 of a step, and five standard errors of a coin's mean.
    assert error.abs().max() < 1 / 256 + 5 * 0.5 / math.sqrt(draws)
    assert torch.equal(rounded, stochastic_round(x.expand(draws, -1), form, random))
