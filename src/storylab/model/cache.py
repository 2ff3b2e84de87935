"""Key/value caches for generation, one token at a time.

A cache grows, or is static: of one size, with its length in a tensor, so that a step can be recorded once
and replayed at every position. Shapes: B batch, H query heads, K key/value heads, T new positions, S stored
positions, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from storylab.config import AttentionPattern
from storylab.model.attention import causal_attention
from storylab.model.language_model import Shape


class GrowingLayerCache(ABC):
    """Keys and values of one layer, as many as have been read."""

    @abstractmethod
    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, K, T, D]``; return all that the new positions may read, theirs last."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern
    ) -> Tensor:
        """Attention ``[B, H, T, D]`` of new positions over all; their keys and values are stored."""
        return causal_attention(query, *self.append(key, value), pattern)


class LayerKVCache(GrowingLayerCache):
    """Keys and values of all positions that one layer has read, in ``[B, K, max_length, D]``."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device) -> None:
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, K, T, D]`` after the filled positions; return all keys and values so far."""
        if self.length == 0:  # autocast decides the dtype of keys and values
            self.keys, self.values = self.keys.to(key.dtype), self.values.to(value.dtype)
        start, self.length = self.length, self.length + key.shape[2]
        self.keys[:, :, start : self.length] = key
        self.values[:, :, start : self.length] = value
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class SlidingWindowKVCache(GrowingLayerCache):
    """Keys and values of the last ``max_past`` positions, which are all that later queries read."""

    def __init__(self, max_past: int) -> None:
        self.max_past = max_past
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stored positions followed by ``[B, K, T, D]``, and store the end of both."""
        if self.keys is not None and self.values is not None:
            key = torch.cat((self.keys, key), dim=2)
            value = torch.cat((self.values, value), dim=2)
        first = max(key.shape[2] - self.max_past, 0)
        # Copies, as a view would hold on to the whole prompt.
        self.keys, self.values = key[:, :, first:].clone(), value[:, :, first:].clone()
        return key, value


class StaticLayerCache:
    """Keys and values of one layer in tensors that stay where they are, ``[B, K, max_length, D]``."""

    def __init__(self, max_length: int, length: Tensor) -> None:
        self.max_length, self.length = max_length, length
        self.empty = True
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern
    ) -> Tensor:
        """Attention ``[B, H, T, D]`` of new positions over all; their keys and values are stored."""
        if self.keys is None or self.values is None:  # autocast decides their dtype
            shape = (*key.shape[:2], self.max_length, key.shape[3])
            self.keys, self.values = key.new_zeros(shape), value.new_zeros(shape)
        positions = self.length + torch.arange(key.shape[2], device=key.device)
        self.keys.index_copy_(2, positions, key)
        self.values.index_copy_(2, positions, value)
        was_empty, self.empty = self.empty, False
        if was_empty and key.shape[2] > 1:  # so there is nothing else to read
            return causal_attention(query, key, value, pattern)
        stored = torch.arange(self.max_length, device=key.device)
        mask = pattern.allows(positions.unsqueeze(1), stored.unsqueeze(0))
        # The heads of a group are further rows: no kernel takes grouped heads together with a mask.
        group = query.shape[1] // key.shape[1]
        rows = query.unflatten(1, (-1, group)).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(
            rows, self.keys, self.values, attn_mask=mask.repeat(group, 1)
        )
        return mixed.unflatten(2, (group, -1)).flatten(1, 2)


AnyLayerCache = GrowingLayerCache | StaticLayerCache


class KVCache:
    """The caches of all layers, and the number of positions read so far."""

    def __init__(self, config: Shape, batch: int, max_length: int, device: torch.device) -> None:
        shape = (batch, config.n_kv_head, max_length, config.head_size)
        self.length = 0
        self.layers: list[AnyLayerCache] = [
            LayerKVCache(shape, device)
            if pattern.reach is None
            else SlidingWindowKVCache(pattern.reach - 1)
            for pattern in config.layer_patterns
        ]


class StaticKVCache:
    """Static caches of all layers; ``length`` is the number of positions read so far, int64 ``[1]``.

    Nothing in a step depends on a value that the host knows, so a CUDA graph of a step serves for every
    position. The caller reads no more than ``max_length`` positions.
    """

    def __init__(self, config: Shape, max_length: int, device: torch.device) -> None:
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self.layers = [StaticLayerCache(max_length, self.length) for _ in config.layer_patterns]

    def restart(self) -> None:
        """Forget all positions."""
        self.length.zero_()
        for layer in self.layers:
            layer.empty = True


AnyKVCache = KVCache | StaticKVCache


def positions_of(tokens: Tensor, cache: AnyKVCache | None) -> Tensor:
    """Positions, int64 ``[T]``, of ``tokens [B, T]`` that continue those in the cache."""
    start = 0 if cache is None else cache.length
    return start + torch.arange(tokens.shape[1], device=tokens.device)
