"""Attention patterns on CUDA: windows by flash attention, others by FlexAttention.

Flash attention skips the positions outside of a window, needs no compiler and takes bfloat16 and float16.
From 2.11 on torch has it with windows, for sequences of any lengths laid end to end (``varlen_attn``).
FlexAttention skips the blocks of 128 positions that a pattern leaves empty.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from storylab.compiler import missing_for_compiling
from storylab.config import AttentionPattern, Window
from storylab.model.autocast import compute_dtype

# FlexAttention refuses smaller heads.
MIN_FLEX_HEAD = 16
# Flash attention's head sizes are multiples of 8 up to this, larger ones on some cards only; its kernels
# need Ampere or newer.
MAX_FLASH_HEAD = 192
FLASH_CAPABILITY = (8, 0)


class FlashWindow(NamedTuple):
    """A sliding window for flash attention.

    Attributes:
        starts: where each sequence begins among all, and the end of the last: int32 ``[B + 1]``.
        time: length of every sequence.
        size: positions that a query reads, its own included.
    """

    starts: Tensor
    time: int
    size: int


CudaMask = BlockMask | FlashWindow


def cuda_masks(
    patterns: Sequence[AttentionPattern], x: Tensor, head_size: int
) -> list[CudaMask | None]:
    """The mask of each layer for its kernel, where ``x [B, T, ...]`` has the positions; called under the
    autocast of the layers.

    None where another path is taken: on other devices than CUDA, where no kernel takes the pattern, the
    dtype or the heads, and where a pattern leaves nothing out.

    Called outside of compiled blocks, which would build the masks again in every pass.
    """
    device, (batch, time) = x.device, x.shape[:2]
    if device.type != "cuda" or all(pattern.covers(time) for pattern in patterns):
        return [None] * len(patterns)
    flash = _takes_flash_windows(x, head_size)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * time

    def mask(pattern: AttentionPattern) -> CudaMask | None:
        if pattern.covers(time):
            return None
        if flash and isinstance(pattern, Window):
            return FlashWindow(starts, time, pattern.size)
        flex = head_size >= MIN_FLEX_HEAD and missing_for_compiling("cuda") is None
        return _block_mask(time, pattern, device) if flex else None

    return [mask(pattern) for pattern in patterns]


def attention_on_cuda(query: Tensor, key: Tensor, value: Tensor, mask: CudaMask) -> Tensor:
    """Attention ``[B, H, T, D]`` of ``query [B, H, T, D]``, ``key`` and ``value [B, K, T, D]``."""
    if isinstance(mask, FlashWindow):
        return _flash_window(query, key, value, mask)
    return _flex_attention(query, key, value, mask)


def _find_varlen() -> Callable[..., Any] | None:
    """torch's flash attention with windows, for grouped heads; None if this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters:
        return None
    # Older versions take grouped heads without being told.
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in parameters else varlen_attn


VARLEN_ATTENTION = _find_varlen()


def _takes_flash_windows(x: Tensor, head_size: int) -> bool:
    return (
        VARLEN_ATTENTION is not None
        and torch.backends.cuda.is_flash_attention_available()
        and compute_dtype(x) in (torch.bfloat16, torch.float16)
        and head_size % 8 == 0
        and head_size <= MAX_FLASH_HEAD
        and torch.cuda.get_device_capability(x.device) >= FLASH_CAPABILITY
    )


def _flash_window(query: Tensor, key: Tensor, value: Tensor, window: FlashWindow) -> Tensor:
    """Attention in a sliding window (Dao 2023, arXiv 2307.08691).

    https://docs.pytorch.org/docs/stable/nn.attention.varlen.html
    """
    assert VARLEN_ATTENTION is not None
    starts, time, size = window
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    # The positions before the query's own, and those after it.
    mixed: Tensor = VARLEN_ATTENTION(*flat, starts, starts, time, time, window_size=(size - 1, 0))
    return mixed.unflatten(0, (-1, time)).transpose(1, 2)


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
