"""PyTorch's torchao: its float8 linear layer.

The library is optional, needs an NVIDIA GPU and is loaded by :func:`load` only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storylab.config import Backend
from storylab.errors import UserError
from storylab.precision.backends.protocol import (
    EMULATED,
    PrecisionBackend,
    require_features,
    without_block_choice,
)
from storylab.precision.features import Capability
from storylab.precision.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from torch import nn

# torchao's names of our recipes.
TORCHAO_NAMES = {"fp8-current": "tensorwise", "fp8-rowwise": "rowwise"}


@dataclass(frozen=True)
class Torchao:
    """torchao, set up for one recipe.

    Attributes:
        convert: the library's ``convert_to_float8_training``.
        config: its argument of that name.
        alignment, compiles: see :class:`PrecisionBackend`.
    """

    convert: Any
    config: Any
    alignment: int = 16
    compiles: bool = True
    name: Backend = "torchao"

    def layer(self, linear: nn.Linear) -> nn.Module:
        from torch import nn

        # A new layer with the same weight, as the conversion replaces the children of a module.
        plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        plain.weight = linear.weight
        converted: nn.Module = self.convert(nn.Sequential(plain), config=self.config)[0]
        return converted

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()


def torchao_name(recipe: Recipe) -> str | None:
    """torchao's name of a recipe; None if it has no such recipe."""
    wanted = without_block_choice(recipe)
    names = (theirs for ours, theirs in TORCHAO_NAMES.items() if RECIPES[ours] == wanted)
    return next(names, None)


def computes(recipe: Recipe) -> bool:
    """Whether torchao computes exactly this recipe, on some GPU."""
    return torchao_name(recipe) is not None


def load(recipe: Recipe, gpu: str, capability: Capability) -> PrecisionBackend:
    """torchao's float8 for ``recipe`` on a GPU called ``gpu``.

    Raises:
        UserError: GPU or library cannot run exactly this recipe, or the library is missing.
    """
    require_features(recipe, gpu, capability)
    name = torchao_name(recipe)
    if name is None:
        raise UserError(
            f"torchao runs {' and '.join(TORCHAO_NAMES)} as they are: use one, or {EMULATED}"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(
            f"torchao is not installed: pip install 'storylab[torchao]', or {EMULATED}"
        ) from error
    config = Float8LinearConfig.from_recipe_name(name)
    return Torchao(convert_to_float8_training, config, recipe.alignment)
