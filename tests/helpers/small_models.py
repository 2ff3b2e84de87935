"""Small models of several shapes, for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from storylab.config import ModelConfig
from storylab.model.transformer import Transformer

SHAPES = [
    ModelConfig(n_layer=2, n_head=4, n_kv_head=4, n_embd=64, n_hidden=96),
    ModelConfig(n_layer=3, n_head=4, n_kv_head=1, n_embd=64, n_hidden=160),
    ModelConfig(n_layer=1, n_head=6, n_kv_head=2, n_embd=48, n_hidden=64, rope_base=500.0),
]
VOCAB = 97
OPTIONS: dict[str, Any] = {
    "qk_norm": True,
    "embedding_residual": True,
    "value_residual": "first_layer",
}


def tokens(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def with_options() -> Transformer:
    """A model with every option on, whose added scales are not where they begin."""
    config = dataclasses.replace(SHAPES[1], **OPTIONS)
    model = Transformer(config, VOCAB, seed=2)
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model
