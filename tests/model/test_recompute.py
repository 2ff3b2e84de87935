"""Gradients with activations computed again are those without."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from small_models import VOCAB, tokens, with_options
from storylab.config import ModelConfig
from storylab.model.layers import rope_cos_sin
from storylab.model.transformer import Transformer


def test_gradients_of_every_option_are_those_without_redoing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, y = with_options(), tokens(2, 9), tokens(2, 9, seed=1)
    redone = torch.autograd.grad(model(x, y), list(model.parameters()))
    # A CPU always recomputes; only a GPU keeps the activations.
    monkeypatch.setattr("storylab.model.recompute.recomputes_activations", lambda x: False)
    kept = torch.autograd.grad(model(x, y), list(model.parameters()))
    for (name, _), one, other in zip(model.named_parameters(), redone, kept, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_a_compiled_block_keeps_its_linear_layers_results_only() -> None:
    config = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_hidden=96)
    batch, time = 3, 16
    model, stream = Transformer(config, VOCAB), torch.randn(batch, time, config.n_embd)
    rotary = rope_cos_sin(config, torch.arange(time))
    torch.compiler.reset()
    for block in model.blocks:  # the division of work that a compiler makes, without its code
        block.compile(backend="aot_eager_decomp_partition")
    kept: Counter[tuple[int, ...]] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tuple(tensor.shape)] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in model.blocks:
            stream, _ = block(stream, rotary)
    torch.compiler.reset()
    rows = batch * time
    products = [(rows, config.qkv_size), (rows, config.n_embd), (rows, 2 * config.n_hidden)]
    assert all(kept.pop(shape) == config.n_layer for shape in products)
    # And the stream that enters each block. What is left is small, such as the rotary angles.
    assert kept.pop((batch, time, config.n_embd)) == config.n_layer
    assert all(math.prod(shape) <= time * config.head_size for shape in kept)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_gradients_of_compiled_blocks_are_those_of_plain_ones() -> None:
    model, x, y = with_options(), tokens(2, 9), tokens(2, 9, seed=1)
    plain = torch.autograd.grad(model(x, y), list(model.parameters()))
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager_decomp_partition")
    compiled = torch.autograd.grad(model(x, y), list(model.parameters()))
    torch.compiler.reset()
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other)
