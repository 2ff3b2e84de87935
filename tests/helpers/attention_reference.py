"""Attention computed position by position, and inputs for it."""

from __future__ import annotations

import torch


def brute_force(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Position by position in float64, with no mask at all."""
    batch, heads, time, size = query.shape
    kv_heads, source = key.shape[1], key.shape[2]
    query, key, value = query.double(), key.double(), value.double()
    result = torch.empty(batch, heads, time, size, dtype=torch.float64)
    for head in range(heads):
        k, v = (x[:, head * kv_heads // heads] for x in (key, value))
        for row in range(time):
            position = source - time + row
            first = 0 if window is None else max(0, position - window + 1)
            scores = torch.einsum("bd,bsd->bs", query[:, head, row], k[:, first : position + 1])
            weights = (scores / size**0.5).softmax(dim=-1)
            result[:, head, row] = torch.einsum("bs,bsd->bd", weights, v[:, first : position + 1])
    return result


def draw(time: int, source: int, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(time * 1000 + source)
    shapes = [(2, heads, time, 8), (2, kv_heads, source, 8), (2, kv_heads, source, 8)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
