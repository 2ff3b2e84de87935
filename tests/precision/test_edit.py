"""Recipes are changed by words, and a change without sense is refused."""

from __future__ import annotations

import pytest

from storylab.errors import UserError
from storylab.precision.edit import find_recipe
from storylab.precision.recipes import (
    RECIPES,
)


def test_a_recipe_is_changed_by_words() -> None:
    changed = find_recipe(
        "nvf4", "hadamard=false *.gradient.stochastic=false input_gradient=bfloat16"
    )
    assert changed is not None and not changed.hadamard and changed.input_gradient is None
    assert changed.weight_gradient is not None and not changed.weight_gradient[0].stochastic
    assert find_recipe("fp4") == RECIPES["nvfp4"] and find_recipe("bfloat16") is None
    flat = find_recipe("nvfp4", "*.weight.square=false high_last_share=0.5")
    assert flat is not None and flat.forward is not None and not flat.forward[1].square
    assert flat.quantized_blocks(4) == range(2)


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [
        ("bfloat16", "hadamard=false", "no recipe to change"),
        ("nvfp4", "hadamart=false", "perhaps you meant hadamard"),
        ("nvfp4", "hadamard=maybe", "use one of true, false"),
        ("nvfp4", "forward.weigth.square=false", "perhaps you meant weight"),
        ("nvfp4", "forward.gradient.square=false", "fits no operand"),
        ("nvfp4", "hadamard", "write FIELD=VALUE"),
        ("nvfp4", "high_last_share=2", "out of range"),
        ("fp8", "history=many", "must be a number"),
        ("nvfp4", "forward=fp8", "bfloat16 only"),
        ("mxfp8", "*.gradient.stochastic=true", "stochastic is for nvfp4 scaling"),
        ("fp8-current", "*.*.square=true", "square is for nvfp4 scaling"),
        ("fp8-current", "margin=3", "margin and history are for delayed"),
        ("fp8", "margin=1000000", "margin must be at most 64"),
        ("nvfp4", "*.*.format=e4m3", "for e2m1 elements"),
        ("mxfp8", "*.*.format=e2m1", "need nvfp4 scaling"),
        ("fp8", "history=0", "at least 1"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(dtype: str, changes: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_recipe(dtype, changes)
