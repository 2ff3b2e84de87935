"""Attention against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from storylab.model.attention import MAX_MATMUL_ATTENTION_LENGTH, causal_attention


def brute_force_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One query position and head at a time, in float64."""
    batch, heads, time, size = query.shape
    group, past = heads // key.shape[1], key.shape[2] - time
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(time):
                keys = key[b, h // group, : past + t + 1].double()
                weights = (keys @ query[b, h, t].double() / math.sqrt(size)).softmax(0)
                out[b, h, t] = weights @ value[b, h // group, : past + t + 1].double()
    return out


@pytest.mark.parametrize(("time", "past"), [(7, 0), (1, 6), (3, 4)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("limit", [0, MAX_MATMUL_ATTENTION_LENGTH])
def test_attention_is_that_of_the_definition(
    time: int, past: int, kv_heads: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A limit of 0 takes the path of the flash kernel, which short sequences do not.
    monkeypatch.setattr("storylab.model.attention.MAX_MATMUL_ATTENTION_LENGTH", limit)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, time, 8, generator=generator)
    key = torch.randn(2, kv_heads, time + past, 8, generator=generator)
    value = torch.randn(2, kv_heads, time + past, 8, generator=generator)
    expected = brute_force_attention(query, key, value)
    ours = causal_attention(query, key, value).double()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
