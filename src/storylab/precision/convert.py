"""Replace a model's linear layers by layers of a precision recipe."""

from __future__ import annotations

from torch import nn

from storylab.precision.backends.protocol import PrecisionBackend
from storylab.precision.linear import BackendLinear, QuantizedLinear
from storylab.precision.recipes import Recipe, layer_name
from storylab.precision.state import QuantizationState


def quantize_blocks(
    blocks: nn.ModuleList,
    recipe: Recipe,
    seed: int,
    max_iters: int,
    backend: PrecisionBackend | None = None,
) -> QuantizationState:
    """Replace the linear layers of the blocks that ``recipe`` quantizes; weights keep their names.

    Args:
        blocks: the model's transformer blocks, in order.
        recipe: how to quantize, and which blocks to leave alone.
        seed: seed of stochastic rounding.
        max_iters: number of the last iteration.
        backend: computes the products; None emulates.

    Returns:
        The state that the layers share; the training loop advances its iteration.
    """
    state = QuantizationState(seed, max_iters)
    for index in recipe.quantized_blocks(len(blocks)):
        for name, module in list(blocks[index].named_modules()):
            if type(module) is nn.Linear:
                parent = blocks[index].get_submodule(name.rpartition(".")[0])
                layer = make_layer(module, recipe, state, layer_name(index, name), backend)
                setattr(parent, name.rpartition(".")[2], layer)
    return state


def make_layer(
    linear: nn.Linear,
    recipe: Recipe,
    state: QuantizationState,
    name: str,
    backend: PrecisionBackend | None,
) -> QuantizedLinear | BackendLinear:
    """A layer with the weight of ``linear`` that multiplies by the recipe."""
    if backend is not None:
        return BackendLinear(linear, backend, state)
    return QuantizedLinear(linear, recipe, state, name)
