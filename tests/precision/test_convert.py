"""A model whose layers are replaced keeps its weights and their names."""

from __future__ import annotations

import torch

from samples import TINY
from storylab.model.transformer import Transformer
from storylab.precision.convert import quantize_blocks
from storylab.precision.recipes import (
    RECIPES,
)


def test_a_model_keeps_its_weights_and_their_names() -> None:
    plain, low = Transformer(TINY, 50, seed=1), Transformer(TINY, 50, seed=1)
    quantize_blocks(low.blocks, RECIPES["nvfp4"], seed=1, max_iters=8)
    kinds = [type(block.attention.qkv).__name__ for block in low.blocks]
    assert kinds == ["QuantizedLinear", "Linear"]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), low.parameters(), strict=True))
    assert list(plain.state_dict()) == list(low.state_dict())
