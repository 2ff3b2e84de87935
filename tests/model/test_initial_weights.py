"""Initial weights: drawn by name, with the stated distribution."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from storylab.config import ModelConfig
from storylab.model.initialization import initialize_weights
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


def weights(config: ModelConfig, seed: int = 5, vocab: int = 500) -> dict[str, Tensor]:
    return dict(Transformer(config, vocab, seed).state_dict())


WIDE = ModelConfig(n_layer=8, n_head=4, n_kv_head=2, n_embd=128, n_hidden=256)


OF_RESIDUAL = ("out.weight", "down.weight")


def test_distribution_of_initial_weights() -> None:
    for name, p in weights(WIDE).items():
        if p.dim() < 2:
            assert bool((p == 1).all())
            continue
        std = 0.02 / math.sqrt(16) if name.endswith(OF_RESIDUAL) else 0.02
        # Five standard errors of the mean, of the standard deviation, and of the share within one.
        root, within = math.sqrt(p.numel()), math.erf(math.sqrt(0.5))
        assert abs(p.mean().item()) < 5 * std / root
        assert p.std().item() == pytest.approx(std, rel=5 / (math.sqrt(2) * root))
        share = (p.abs() < std).double().mean().item()
        assert share == pytest.approx(within, abs=5 * math.sqrt(within * (1 - within)) / root)


def test_initial_weights_of_two_parameters_are_not_correlated() -> None:
    """Nor are those of one parameter under two seeds."""
    drawn = {(seed, k): v for seed in (5, 6) for k, v in weights(WIDE, seed).items() if v.dim() > 1}
    size = min(x.numel() for x in drawn.values())
    table = torch.stack([x.flatten()[:size] for x in drawn.values()])
    correlations = torch.corrcoef(table).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(size)


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "window:8"},
        {"attention": "window:8*7,full"},
        {"qk_norm": True},
        {"value_residual": "first_layer"},
        {"embedding_residual": True},
        {"rope_base": 500.0},
        OPTIONS,
    ],
    ids=lambda change: " ".join(change),
)
def test_models_that_differ_in_a_part_share_the_rest(change: dict[str, Any]) -> None:
    plain, other = weights(WIDE), weights(dataclasses.replace(WIDE, **change))
    assert plain.keys() <= other.keys()
    assert all(torch.equal(other[name], plain[name]) for name in plain)


@pytest.mark.parametrize("layers", [1, 9, 16])
def test_models_of_another_depth_share_their_common_layers(layers: int) -> None:
    """The scale of projections that write to the residual stream depends on the depth."""
    one, other = weights(WIDE), weights(dataclasses.replace(WIDE, n_layer=layers))
    common = one.keys() & other.keys()
    assert len(common) == min(len(one), len(other))
    for name in common:
        if name.endswith(OF_RESIDUAL):
            ratio = math.sqrt(WIDE.n_layer / layers)
            torch.testing.assert_close(other[name], one[name] * ratio, rtol=1e-6, atol=0)
        else:
            assert torch.equal(one[name], other[name]), name


def test_a_change_of_shape_leaves_the_other_parameters() -> None:
    one, other = weights(WIDE), weights(dataclasses.replace(WIDE, n_hidden=384), vocab=700)
    same = {name for name in one if torch.equal(one[name], other[name])}
    reshaped = ("embedding.weight", "gate_up.weight", "down.weight")
    assert same == {name for name in one if not name.endswith(reshaped)}


def test_initial_weights_of_a_seed() -> None:
    """A seed gives the same weights again; another seed shares no random one."""
    one, again, other = weights(WIDE), weights(WIDE), weights(WIDE, seed=6)
    assert all(torch.equal(one[name], again[name]) for name in one)
    for name, p in one.items():
        if p.dim() > 1:
            assert (p == other[name]).float().mean() < 1e-3, name


def test_order_of_parameters_does_not_matter_to_initial_weights() -> None:
    """Nor does the state of torch's own generator."""
    model = Transformer(SHAPES[1], VOCAB, seed=4)
    before = dict(model.state_dict())
    turned = Transformer(SHAPES[1], VOCAB, seed=0)
    turned._modules = dict(reversed(turned._modules.items()))
    for block in turned.blocks:
        block._modules = dict(reversed(block._modules.items()))
    assert [*turned.state_dict()] != [*before]
    torch.manual_seed(123)
    initialize_weights(turned, SHAPES[1].n_layer, seed=4)
    assert all(torch.equal(turned.state_dict()[name], p) for name, p in before.items())
