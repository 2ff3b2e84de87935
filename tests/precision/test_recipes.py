"""Recipes: which layers run in low precision, and their share of the work."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from storylab.config import NATIVE_DTYPES, Dtype, ModelConfig
from storylab.precision.edit import find_recipe
from storylab.precision.recipes import (
    ALIASES,
    RECIPES,
    block_of,
    layer_name,
    quantized_flops_fraction,
)


def test_a_layers_name_says_its_block() -> None:
    assert block_of(layer_name(11, "feed_forward.down")) == 11


def test_the_last_share_of_blocks_stays_high() -> None:
    assert RECIPES["nvfp4"].quantized_blocks(12) == range(10)
    assert RECIPES["fp8"].quantized_blocks(12) == range(12)
    first = dataclasses.replace(RECIPES["nvfp4"], high_first=1)
    assert first.quantized_blocks(12) == range(1, 10)


def test_share_of_the_work_in_low_precision() -> None:
    """The original log's model, by hand: FLOPs a token of one product, in millions."""
    model = ModelConfig()
    block = 2 * (768 * 768 * 2 + 2 * 768 * 192 + 3 * 768 * 2048) / 1e6
    head, attention = 2 * 768 * 50257 / 1e6, 12 * 4 * 768 * 64.5 / 1e6
    whole = 3 * (12 * block + head + attention)
    for name, blocks in (("fp8", 12), ("nvfp4", 10)):
        share = quantized_flops_fraction(RECIPES[name], model, 50257, 128)
        assert share == pytest.approx(3 * blocks * block / whole)
    for changes, products in (
        ("forward=bfloat16", 2),
        ("input_gradient=bfloat16 weight_gradient=bfloat16", 1),
        ("low_forward_share=0.8", 2.8),
    ):
        recipe = find_recipe("nvfp4", changes)
        assert recipe is not None
        share = quantized_flops_fraction(recipe, model, 50257, 128)
        assert share == pytest.approx(products * 10 * block / whole)


def test_every_recipe_has_a_flag() -> None:
    assert {*RECIPES, *ALIASES, *NATIVE_DTYPES} == set(get_args(Dtype))
