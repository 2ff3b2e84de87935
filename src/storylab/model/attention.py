"""Causal attention in the pattern of a layer, on the fast path of each device.

:mod:`storylab.config.patterns` has the patterns. A pattern with a reach is computed in bands, at a cost of
T times the reach; on CUDA FlexAttention skips the blocks that any pattern leaves out; elsewhere a pattern's
mask is a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from storylab.compiler import missing_for_compiling
from storylab.config import FULL, AttentionPattern

# Up to this length the CPU is faster with plain batched products than with the flash kernel, whose
# backward pass is slow on short sequences (docs/performance.md has the measurement).
MAX_MATMUL_ATTENTION_LENGTH = 512
# FlexAttention refuses smaller heads.
MIN_FLEX_HEAD = 16
# Blocks below this are too small for a matrix product to be worth its call.
MIN_BLOCK = 32


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AttentionPattern = FULL,
    block_mask: BlockMask | None = None,
) -> Tensor:
    """softmax(QK'/sqrt(D) + mask) V with grouped key/value heads.

    Args:
        query: ``[B, H, T, D]``; its positions are the last T of the S key positions.
        key: ``[B, K, S, D]``; query head h reads key/value head h * K // H.
        value: ``[B, K, S, D]``.
        pattern: the positions that a query reads.
        block_mask: the pattern's, as :func:`block_masks` has it, for FlexAttention on CUDA.

    Returns:
        ``[B, H, T, D]`` in the dtype of ``query``.
    """
    if block_mask is not None:
        return _flex_attention(query, key, value, block_mask)
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


def block_masks(
    patterns: Sequence[AttentionPattern], time: int, device: torch.device, head_size: int
) -> list[BlockMask | None]:
    """One FlexAttention block mask per layer, for sequences of ``time`` positions; None where another path
    is taken: on other devices than CUDA, where FlexAttention cannot be compiled, for heads that it does
    not take, and where a pattern leaves nothing out.

    Called outside of compiled blocks, which would build the masks again in every pass.
    """
    used = (
        device.type == "cuda"
        and head_size >= MIN_FLEX_HEAD
        and missing_for_compiling("cuda") is None
    )
    return [
        _block_mask(time, pattern, device) if used and not pattern.covers(time) else None
        for pattern in patterns
    ]


@cache
def _block_mask(time: int, pattern: AttentionPattern, device: torch.device) -> BlockMask:
    def allowed(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        mask: Tensor = pattern.allows(row, column)
        return mask

    return create_block_mask(allowed, None, None, time, time, device=str(device))


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> Tensor:
    """Attention by FlexAttention, which skips the blocks that the mask leaves empty.

    https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
    """
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        mixed: Tensor = flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
        return mixed
    # Evaluation runs uncompiled, except for this: uncompiled it would store and round all scores.
    with torch.compiler.set_stance("default"):
        mixed = _compiled_flex()(query, key, value, block_mask=block_mask, enable_gqa=True)
    return mixed


@cache
def _compiled_flex() -> Any:
    # A separate kernel for each length: one for all lengths is slower.
    return torch.compile(flex_attention, dynamic=False)
