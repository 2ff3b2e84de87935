"""Causal attention, whole or in a sliding window, on the fast path of each device.

A window of W positions: a query reads its own position and the W - 1 before it (Beltagy et al.
2020, arXiv 2004.05150; Mistral 7B, arXiv 2310.06825). W of None reads everything before it.
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

# Up to this length the CPU is faster with plain batched products than with the flash kernel, whose
# backward pass is slow on short sequences (docs/performance.md has the measurement).
MAX_PRODUCT_LENGTH = 512
# FlexAttention refuses smaller heads.
MIN_FLEX_HEAD = 16
# Blocks below this are too small for a matrix product to be worth its call.
MIN_BLOCK = 32


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None = None,
    block_mask: BlockMask | None = None,
) -> Tensor:
    """softmax(QK'/sqrt(D) + mask) V with grouped key/value heads.

    Args:
        query: ``[B, H, T, D]``; its positions are the last T of the S key positions.
        key: ``[B, K, S, D]``; query head h reads key/value head h * K // H.
        value: ``[B, K, S, D]``.
        window: number of positions that a query reads, its own included; None: all before it.
        block_mask: the window as :func:`block_masks` has it, for training on CUDA.

    Returns:
        ``[B, H, T, D]`` in the dtype of ``query``.
    """
    if block_mask is not None:
        return _flex_attention(query, key, value, block_mask)
    time, source = query.shape[2], key.shape[2]
    if window is not None and window >= source:
        window = None
    whole = time == source
    if whole and window is not None and source > 2 * window:
        return _banded_attention(query, key, value, window)
    if query.device.type == "cpu" and source <= MAX_PRODUCT_LENGTH:
        return _product_attention(query, key, value, _mask(time, source, window, query.device))
    if window is None and (whole or time == 1):
        # A lone query reads everything, and flash attention takes no mask.
        return F.scaled_dot_product_attention(query, key, value, is_causal=whole, enable_gqa=True)
    mask = _mask(time, source, window, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def _mask(time: int, source: int, window: int | None, device: torch.device) -> Tensor:
    """True where query i of the last ``time`` positions may read key j: ``[time, source]``."""
    mask = torch.ones(time, source, dtype=torch.bool, device=device).tril(source - time)
    return mask if window is None else mask.triu(source - time - window + 1)


def _product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
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


def _banded_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attention in a window, at a cost of T * W rather than T * T.

    Time is cut into blocks at least as long as the window, so a block of queries needs the keys
    of its own block and of the one before it only.
    """
    batch, heads, time, size = query.shape
    block = max(window, MIN_BLOCK)
    blocks = -(-time // block)
    query, key, value = (F.pad(x, (0, 0, 0, blocks * block - time)) for x in (query, key, value))

    def cut(x: Tensor) -> Tensor:
        """``[B, heads, n * block, D]`` to ``[B * n, heads, block, D]``."""
        x = x.unflatten(2, (blocks, block)).transpose(1, 2)
        return x.reshape(batch * blocks, -1, block, size)

    def with_block_before(x: Tensor) -> Tensor:
        """Each block behind the one before it, zeros before the first: ``[B * n, K, 2 * block, D]``."""
        before = F.pad(x, (0, 0, block, 0))[:, :, :-block]
        return torch.cat((cut(before), cut(x)), dim=2)

    mask = _mask(block, 2 * block, window, query.device).repeat(blocks, 1, 1)
    mask[0, :, :block] = False
    mixed = _product_attention(
        cut(query), with_block_before(key), with_block_before(value), mask.repeat(batch, 1, 1)
    )
    mixed = mixed.view(batch, blocks, heads, block, size).transpose(1, 2)
    return mixed.reshape(batch, heads, blocks * block, size)[:, :, :time]


def block_masks(
    windows: Sequence[int | None], time: int, device: torch.device, head_size: int
) -> list[BlockMask | None]:
    """For each layer's window the blocks of a sequence of ``time`` positions that FlexAttention reads, or
    None where it is not used: on other devices than CUDA, where it cannot be compiled, for heads that
    it does not take, and where nothing is left out.

    Made outside of compiled blocks, which would make them anew in every pass.
    """
    used = (
        device.type == "cuda"
        and head_size >= MIN_FLEX_HEAD
        and missing_for_compiling("cuda") is None
    )
    return [
        _block_mask(time, window, device) if used and window is not None and window < time else None
        for window in windows
    ]


@cache
def _block_mask(time: int, window: int, device: torch.device) -> BlockMask:
    def allowed(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row - column < window)

    return create_block_mask(allowed, None, None, time, time, device=str(device))


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> Tensor:
    """Attention in a window by FlexAttention, which skips the blocks that the mask leaves empty.

    https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
    """
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        mixed: Tensor = flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
        return mixed
    # Evaluation runs uncompiled but for this, which would make all scores and round them.
    with torch.compiler.set_stance("default"):
        mixed = _compiled_flex()(query, key, value, block_mask=block_mask, enable_gqa=True)
    return mixed


@cache
def _compiled_flex() -> Any:
    # For each length a kernel of its own: one for all lengths is slower.
    return torch.compile(flex_attention, dynamic=False)
