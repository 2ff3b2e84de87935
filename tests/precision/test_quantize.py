"""Quantizers against ml_dtypes, TransformerEngine's own reference and torchao's.

The last two are used where they are installed (pip install --no-deps transformer-engine torchao); their
requirements are for GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import conformance
from conformance import generator
from storylab.precision.formats import E4M3
from storylab.precision.quantize import (
    hadamard,
    hashed_bytes,
    mxfp8,
    nvfp4,
    per_tensor,
    random_bytes,
    tensor_amax,
)


@pytest.mark.slow
@pytest.mark.parametrize("case", conformance.CASES)
def test_every_value_is_that_of_an_independent_implementation(case: str) -> None:
    """The table of docs/precision.md: formats, quantisers and products."""
    try:
        row = conformance.CASES[case]()
    except conformance.OracleMissingError as missing:
        pytest.skip(f"{missing} is not installed")
    assert row.values > 200_000 and row.mismatches <= row.allowed


def test_random_bytes_are_uniform_and_reproducible() -> None:
    shape = torch.Size((256, 1001))
    draws: list[Callable[[int], torch.Tensor]] = [
        lambda seed: random_bytes(shape, generator(seed)),
        lambda seed: hashed_bytes(shape, seed, torch.device("cpu")),
    ]
    for draw in draws:
        assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
        assert_uniform(draw(3))
        # Neighbours, a seed's and a place's, say nothing of each other.
        assert_uniform(draw(3) - draw(4))
        assert_uniform(draw(3)[:, 1:] - draw(3)[:, :-1])


def test_hashed_bytes_are_those_of_splitmix64() -> None:
    """The generator in Python's own integers, as its authors define it."""
    seed, count, word = 2**55 + 12345, 1003, 2**64 - 1
    expected = b""
    for place in range(1, -(-count // 8) + 1):
        x = (seed + place * 0x9E3779B97F4A7C15) & word
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        expected += (x ^ (x >> 31)).to_bytes(8, "little")
    drawn = hashed_bytes(torch.Size((17, 59)), seed, torch.device("cpu"))
    assert drawn.flatten().tolist() == list(expected[:count])


def assert_uniform(drawn: torch.Tensor) -> None:
    counts = torch.bincount(drawn.flatten(), minlength=256).double()
    expected = drawn.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * math.sqrt(2 * 255)


def test_a_tensors_scale_takes_it_to_the_formats_range() -> None:
    x = torch.randn(64, 64, generator=generator(0))
    quantized = per_tensor(x, E4M3)
    assert quantized.operand.abs().max() == 448.0
    assert (quantized.value - x).abs().max() < x.abs().max() * 2**-4
    assert torch.equal(per_tensor(torch.zeros(4, 4), E4M3).value, torch.zeros(4, 4))


@pytest.mark.parametrize("quantize", [lambda x: per_tensor(x, E4M3), mxfp8, nvfp4])
def test_operands_are_exact_in_bfloat16(quantize: Callable[[torch.Tensor], Any]) -> None:
    for x in conformance.tensors(128, 256):
        operand = quantize(x.float()).operand
        assert torch.equal(operand.bfloat16().float(), operand)


def test_four_over_six_errs_no_more_in_any_block() -> None:
    x = torch.randn(256, 512, generator=generator(0))
    plain, chosen = (nvfp4(x, four_over_six=use).value for use in (False, True))
    errors = [(y - x).abs().view(-1, 16).sum(dim=1) for y in (plain, chosen)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all() and errors[1].sum() < 0.99 * errors[0].sum()


def test_the_hadamard_transform_is_orthogonal_and_cancels_in_a_product() -> None:
    eye = torch.eye(16)
    turned = hadamard(eye).float()
    assert torch.equal(turned @ turned.T, eye)
    a, b = (torch.randint(-8, 9, (5, 64), generator=generator(i)).float() for i in (1, 2))
    # Small whole numbers over four stay exact in bfloat16.
    product_of_turned = hadamard(a).float() @ hadamard(b).float().T
    torch.testing.assert_close(product_of_turned, a @ b.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tensor_amax_is_found_in_one_pass(dtype: torch.dtype) -> None:
    for x in conformance.tensors(128, 256):
        assert tensor_amax(x.to(dtype)) == x.to(dtype).abs().max().float()
    assert tensor_amax(torch.tensor([1.0, math.nan])).isnan()
