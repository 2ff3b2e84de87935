"""A cache of a window against generation without one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from example_patterns import EXAMPLES
from samples import TINY
from storylab.model.cache import KVCache, SlidingWindowKVCache
from storylab.model.generate import Sampling, generate
from storylab.model.transformer import Transformer


@pytest.mark.parametrize("pattern", [*EXAMPLES, "window:1", "window:6,full", "window:40"])
def test_generation_with_a_window_cache_is_that_without_one(pattern: str) -> None:
    model = Transformer(dataclasses.replace(TINY, attention=pattern), 50, seed=2)
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]])
    sampling = Sampling(temperature=1.0, seed=7)
    cached, slow = (
        torch.stack(list(generate(model, prompt, 60, sampling, context=48, use_cache=use)))
        for use in (True, False)
    )
    assert torch.equal(cached, slow)


def test_a_window_cache_holds_the_window_only() -> None:
    config = dataclasses.replace(TINY, attention="window:5,full")
    model = Transformer(config, 50, seed=2)
    cache = KVCache(config, 1, 64, torch.device("cpu"))
    for start in range(0, 60, 20):
        model.hidden_states(torch.arange(start, start + 20)[None] % 50, cache)
    windowed = cache.layers[0]
    assert isinstance(windowed, SlidingWindowKVCache)
    assert windowed.keys is not None and windowed.keys.shape[2] == 4
    assert windowed.keys.untyped_storage().nbytes() == windowed.keys.numel() * 4
    assert cache.length == 60
