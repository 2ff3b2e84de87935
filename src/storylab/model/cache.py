"""Key/value caches for generation, one token at a time.

Shapes: B batch, K key/value heads, T new positions, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from storylab.model.language_model import Shape


class LayerKVCache:
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


class SlidingWindowKVCache:
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


AnyLayerCache = LayerKVCache | SlidingWindowKVCache


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
