"""Give a model's linear layers a precision recipe."""

from __future__ import annotations

from torch import nn

from storylab.precision.linear import QuantizationState, QuantizedLinear
from storylab.precision.recipes import Recipe


def quantize_blocks(
    blocks: nn.ModuleList, recipe: Recipe, seed: int, max_iters: int
) -> QuantizationState:
    """Replace the linear layers of the blocks that ``recipe`` quantises; weights keep their names.

    Args:
        blocks: the model's transformer blocks, in order.
        recipe: how to quantise; it says which blocks stay as they are.
        seed: seed of stochastic rounding.
        max_iters: number of the last iteration.

    Returns:
        The state that the layers share; training tells it the iteration.
    """
    state = QuantizationState(seed, max_iters)
    for index in recipe.low_blocks(len(blocks)):
        for name, module in list(blocks[index].named_modules()):
            if type(module) is nn.Linear:
                parent = blocks[index].get_submodule(name.rpartition(".")[0])
                layer = QuantizedLinear(module, recipe, state, f"{index} {name}")
                setattr(parent, name.rpartition(".")[2], layer)
    return state
