"""Give a model's linear layers a precision recipe."""

from __future__ import annotations

from torch import nn

from storylab.config import ModelConfig
from storylab.model.flops import linear_flops, training_flops
from storylab.precision.hardware import Hardware, HardwareLinear
from storylab.precision.linear import QuantizationState, QuantizedLinear
from storylab.precision.recipes import Recipe


def quantize_blocks(
    blocks: nn.ModuleList,
    recipe: Recipe,
    seed: int,
    max_iters: int,
    hardware: Hardware | None = None,
) -> QuantizationState:
    """Replace the linear layers of the blocks that ``recipe`` quantises; weights keep their names.

    Args:
        blocks: the model's transformer blocks, in order.
        recipe: how to quantise; it says which blocks stay as they are.
        seed: seed of stochastic rounding.
        max_iters: number of the last iteration.
        hardware: what computes the products; None emulates.

    Returns:
        The state that the layers share; training tells it the iteration.
    """
    state = QuantizationState(seed, max_iters)
    for index in recipe.low_blocks(len(blocks)):
        for name, module in list(blocks[index].named_modules()):
            if type(module) is nn.Linear:
                parent = blocks[index].get_submodule(name.rpartition(".")[0])
                layer = make_layer(module, recipe, state, f"{index} {name}", hardware)
                setattr(parent, name.rpartition(".")[2], layer)
    return state


def make_layer(
    linear: nn.Linear,
    recipe: Recipe,
    state: QuantizationState,
    name: str,
    hardware: Hardware | None,
) -> QuantizedLinear | HardwareLinear:
    """``linear`` with the same weight, computed by the recipe."""
    if hardware is not None:
        return HardwareLinear(linear, hardware, state)
    return QuantizedLinear(linear, recipe, state, name)


def low_share(recipe: Recipe, model: ModelConfig, vocab_size: int, block_size: int) -> float:
    """Share of a training run's matrix multiplication, in FLOPs, that the recipe quantises."""
    blocks = len(recipe.low_blocks(model.n_layer))
    whole = training_flops(model, vocab_size, block_size)
    return blocks * recipe.low_products * linear_flops(model) / whole
