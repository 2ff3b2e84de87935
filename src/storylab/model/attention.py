"""Causal attention on the fast path of each device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this length the CPU is faster with plain batched products than with the flash kernel, whose
# backward pass is slow on short sequences (docs/performance.md has the measurement).
MAX_PRODUCT_LENGTH = 512


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(QK'/sqrt(D) + causal mask) V with grouped key/value heads.

    Args:
        query: ``[B, H, T, D]``; its positions are the last T of the S key positions.
        key: ``[B, K, S, D]``; query head h reads key/value head h * K // H.
        value: ``[B, K, S, D]``.

    Returns:
        ``[B, H, T, D]`` in the dtype of ``query``.
    """
    time, source = query.shape[2], key.shape[2]
    if query.device.type == "cpu" and source <= MAX_PRODUCT_LENGTH:
        return _product_attention(query, key, value)
    if time == source:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    mask = _causal_mask(time, source, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def _causal_mask(time: int, source: int, device: torch.device) -> Tensor:
    """True where query i of the last ``time`` positions may read key j: ``[time, source]``."""
    return torch.ones(time, source, dtype=torch.bool, device=device).tril(source - time)


def _product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by two batched products; the heads of a group are stacked along time, not copied."""
    batch, heads, time, size = query.shape
    kv_heads, source = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows = (batch * kv_heads, group * time, size)
    columns = (batch * kv_heads, source, size)
    bias = torch.zeros(time, source, dtype=query.dtype, device=query.device)
    bias.masked_fill_(~_causal_mask(time, source, query.device), float("-inf"))
    # Autocast would widen the scores to float32 for the softmax, which computes in float32 anyway.
    with torch.autocast("cpu", enabled=False):
        scores = torch.baddbmm(
            bias.repeat(group, 1),
            query.reshape(rows),
            key.reshape(columns).transpose(1, 2),
            alpha=size**-0.5,
        )
        mixed = torch.bmm(scores.softmax(dim=-1), value.reshape(columns))
    return mixed.view(batch, heads, time, size)
