"""Causal attention in the pattern of a layer, on the fast path of each device.

:mod:`storylab.config.patterns` has the patterns. A pattern with a reach is computed in bands, at a cost of
T times the reach; CUDA has kernels of its own (:mod:`storylab.model.attention_cuda`); elsewhere a pattern's
mask is a tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from storylab.config import FULL, AttentionPattern
from storylab.model.attention_cuda import CudaMask, attention_on_cuda

# Up to this length the CPU is faster with plain batched products than with the flash kernel, whose
# backward pass is slow on short sequences (docs/performance.md has the measurement).
MAX_MATMUL_ATTENTION_LENGTH = 512
# Blocks below this are too small for a matrix product to be worth its call.
MIN_BLOCK = 32


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AttentionPattern = FULL,
    cuda_mask: CudaMask | None = None,
) -> Tensor:
    """softmax(QK'/sqrt(D) + mask) V with grouped key/value heads.

    Args:
        query: ``[B, H, T, D]``; its positions are the last T of the S key positions.
        key: ``[B, K, S, D]``; query head h reads key/value head h * K // H.
        value: ``[B, K, S, D]``.
        pattern: the positions that a query reads.
        cuda_mask: the pattern's for a kernel on CUDA, see :mod:`storylab.model.attention_cuda`.

    Returns:
        ``[B, H, T, D]`` in the dtype of ``query``.
    """
    if cuda_mask is not None:
        return attention_on_cuda(query, key, value, cuda_mask)
    time, source = query.shape[2], key.shape[2]
    whole, reads_all = time == source, pattern.covers(source)
    if whole and not reads_all and pattern.reach is not None and source > 2 * pattern.reach:
        return _banded_attention(query, key, value, pattern, pattern.reach)
    if query.device.type == "cpu" and source <= MAX_MATMUL_ATTENTION_LENGTH:
        return _matmul_attention(query, key, value, _mask(time, source, pattern, query.device))
    if reads_all and (whole or time == 1):
        # A lone query reads everything, and flash attention takes no mask.
        return F.scaled_dot_product_attention(query, key, value, is_causal=whole, enable_gqa=True)
    mask = _mask(time, source, pattern, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def _mask(time: int, source: int, pattern: AttentionPattern, device: torch.device) -> Tensor:
    """True where query i of the last ``time`` positions may read key j: bool ``[time, source]``."""
    keys = torch.arange(source, device=device)
    mask: Tensor = pattern.allows(keys[source - time :].unsqueeze(1), keys.unsqueeze(0))
    return mask


def _matmul_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention by two batched products; the heads of a group are stacked along time, not copied.

    ``query [B, H, T, D]``, ``key`` and ``value [B, K, S, D]``, ``mask`` bool of ``[T, S]``, or of
    ``[B, T, S]`` where it differs between the entries of a batch.
    """
    batch, heads, time, size = query.shape
    kv_heads, source = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows = (batch * kv_heads, group * time, size)
    columns = (batch * kv_heads, source, size)
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill_(~mask, float("-inf")).repeat(*(1,) * (mask.dim() - 2), group, 1)
    if mask.dim() == 3:
        bias = bias.repeat_interleave(kv_heads, dim=0)
    # Autocast would widen the scores to float32 for the softmax, which computes in float32 anyway.
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.baddbmm(
            bias,
            query.reshape(rows),
            key.reshape(columns).transpose(1, 2),
            alpha=size**-0.5,
        )
        mixed = torch.bmm(scores.softmax(dim=-1), value.reshape(columns))
    return mixed.view(batch, heads, time, size)


def _banded_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, reach: int
) -> Tensor:
    """Attention in a pattern of limited reach, at a cost of T * reach rather than T * T.

    Time is split into blocks at least as long as the reach, so a block of queries needs only the
    keys of the same block and of the one before it.
    """
    batch, heads, time, size = query.shape
    block = max(reach, MIN_BLOCK)
    blocks = -(-time // block)
    query, key, value = (F.pad(x, (0, 0, 0, blocks * block - time)) for x in (query, key, value))

    def cut(x: Tensor) -> Tensor:
        """``[B, heads, n * block, D]`` to ``[B * n, heads, block, D]``."""
        x = x.unflatten(2, (blocks, block)).transpose(1, 2)
        return x.reshape(batch * blocks, -1, block, size)

    def with_block_before(x: Tensor) -> Tensor:
        """Each block after the previous one, zeros before the first: ``[B * n, K, 2 * block, D]``."""
        before = F.pad(x, (0, 0, block, 0))[:, :, :-block]
        return torch.cat((cut(before), cut(x)), dim=2)

    mask = _mask(block, 2 * block, pattern, query.device).repeat(blocks, 1, 1)
    mask[0, :, :block] = False
    mixed = _matmul_attention(
        cut(query), with_block_before(key), with_block_before(value), mask.repeat(batch, 1, 1)
    )
    mixed = mixed.view(batch, blocks, heads, block, size).transpose(1, 2)
    return mixed.reshape(batch, heads, blocks * block, size)[:, :, :time]
