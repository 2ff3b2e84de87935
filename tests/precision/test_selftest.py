"""The self-test counts the products that run in low precision, and stops what does not do as it says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from engine_stand_in import (
    B200,
    stand_in,
)
from samples import TINY
from storylab.errors import UserError
from storylab.model.transformer import Transformer
from storylab.precision.backends import te
from storylab.precision.convert import quantize_blocks
from storylab.precision.edit import find_recipe
from storylab.precision.recipes import (
    RECIPES,
)
from storylab.precision.selftest import check_layer, check_model, summarize


@pytest.mark.parametrize("dtype", RECIPES)
def test_the_self_test_counts_what_runs_low(dtype: str) -> None:
    recipe = dataclasses.replace(RECIPES[dtype], low_forward_share=0.5)
    model = Transformer(TINY, 50, seed=1)
    quantize_blocks(model.blocks, recipe, seed=1, max_iters=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = summarize(check_model(model.blocks, recipe, None))
    blocks = len(recipe.quantized_blocks(TINY.n_layer))
    assert found["products"] == found["low"] == blocks * 4 * 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_product_left_in_bfloat16_is_not_counted() -> None:
    recipe = find_recipe("mxfp8", "weight_gradient=bfloat16")
    assert recipe is not None
    checks = list(check_layer("layer", torch.randn(96, 64), recipe, None))
    assert [check.low for check in checks] == [True, True, False]
    assert not any(check.failure for check in checks)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda y: y, "does not run in low precision"),
        (lambda y: y.detach() * 0 + y * 0, "is zero"),
        (lambda y: y * math.nan, "is not finite"),
        (lambda y: y + 0.1 * y.detach().abs().max() * torch.ones_like(y), "more than"),
    ],
)
def test_the_self_test_stops_what_does_not_do_as_it_says(
    broken: Callable[[torch.Tensor], torch.Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that computes in bfloat16 after all, gives zeros, NaN, or something else."""
    recipe = RECIPES["mxfp8"]
    engine = stand_in(monkeypatch, recipe)

    class Kernel(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return broken(super().forward(input))

    engine.Linear = lambda i, o, **_: Kernel(i, o, bias=False)
    backend = dataclasses.replace(te.load(recipe, "card", B200), library=engine)  # type: ignore[type-var]
    model = Transformer(TINY, 50, seed=1)
    quantize_blocks(model.blocks, recipe, 1, 8, backend)
    with pytest.raises(UserError, match=f"self-test failed: block 0.*{message}"):
        check_model(model.blocks, recipe, backend)


def test_an_error_of_the_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES["mxfp8"]
    engine = stand_in(monkeypatch, recipe)

    class Kernel(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand a long tail")

    engine.Linear = lambda i, o, **_: Kernel(i, o, bias=False)
    backend = dataclasses.replace(te.load(recipe, "card", B200), library=engine)  # type: ignore[type-var]
    with pytest.raises(UserError, match=r"te says: CUBLAS_STATUS_NOT_SUPPORTED; try"):
        list(check_layer("layer", torch.randn(64, 64), recipe, backend))
