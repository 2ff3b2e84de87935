"""NVIDIA's TransformerEngine: ``te.Linear`` under ``te.autocast``.

The library is optional, needs an NVIDIA GPU and is loaded by :func:`load` only.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storylab.config import Backend
from storylab.errors import UserError
from storylab.precision.backends import native
from storylab.precision.backends.protocol import (
    EMULATED,
    PrecisionBackend,
    require_features,
    without_block_choice,
)
from storylab.precision.features import GEFORCE_BLACKWELL, Capability
from storylab.precision.recipes import RECIPES, Recipe
from storylab.precision.scalings import (
    DELAYED,
    MXFP8_SCALING,
    NVFP4_SCALING,
    PER_TENSOR,
    Scaling,
)

if TYPE_CHECKING:
    from torch import nn

# Before it (NVIDIA/TransformerEngine pull request 3281) stochastic rounding on compute capability 12
# returned zeros and raised nothing; Hadamard transforms failed there before 2.14 (2968).
TE_FOR_GEFORCE = (2, 20)

# Class and arguments of one of TransformerEngine's recipes. The arguments are complete where the library
# would otherwise read environment variables.
Translation = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class TransformerEngine:
    """TransformerEngine, set up for one recipe.

    Attributes:
        library: the module ``transformer_engine.pytorch``.
        recipe: the library's own recipe.
        alignment, compiles: see :class:`PrecisionBackend`; nobody has compiled its layers here.
    """

    library: Any
    recipe: Any
    alignment: int
    compiles: bool = False
    name: Backend = "te"

    def layer(self, linear: nn.Linear) -> nn.Module:
        kernel: nn.Module = self.library.Linear(
            linear.in_features,
            linear.out_features,
            bias=False,
            params_dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        kernel.weight = linear.weight
        return kernel

    def context(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.library.autocast(
            enabled=True, recipe=self.recipe
        )
        return context


def te_arguments(recipe: Recipe) -> Translation | None:
    """The TransformerEngine recipe that computes ``recipe``; None if there is none."""
    recipe = without_block_choice(recipe)
    scalings = {operand.scaling for operand in recipe.operands}
    if len(scalings) != 1 or recipe.low_forward_share != 1:
        return None
    (scaling,) = scalings
    translate = TRANSLATIONS.get(scaling)
    if translate is None or (recipe.hadamard and scaling is not NVFP4_SCALING):
        return None
    return translate(recipe)


def _delayed(recipe: Recipe) -> Translation | None:
    if _products(recipe) != _products(RECIPES["fp8"]):
        return None
    return "DelayedScaling", {
        "margin": recipe.margin,
        "amax_history_len": recipe.history,
        "reduce_amax": False,
        "backward_override": None,
    }


def _current(recipe: Recipe) -> Translation | None:
    if not _is(recipe, RECIPES["fp8-current"]):
        return None
    return "Float8CurrentScaling", {"use_power_2_scales": False} | _backward(recipe)


def _mxfp8(recipe: Recipe) -> Translation | None:
    return ("MXFP8BlockScaling", _backward(recipe)) if _is(recipe, RECIPES["mxfp8"]) else None


def _nvfp4(recipe: Recipe) -> Translation | None:
    """Three switches: the transform, stochastic rounding of gradients, square blocks of weights."""
    full, forward = RECIPES["nvfp4"], recipe.forward
    if forward is None:
        return None
    # A switch without a product to act on stays on.
    stochastic = recipe.input_gradient is None or recipe.input_gradient[0].stochastic
    hadamard = recipe.weight_gradient is None or recipe.hadamard
    square = forward[1].square
    wanted = full
    for role, option, on in (("gradient", "stochastic", stochastic), ("weight", "square", square)):
        wanted = wanted.with_option(role, option, on)
    if not _is(recipe, wanted):
        return None
    return "NVFP4BlockScaling", {
        "disable_rht": not hadamard,
        "disable_stochastic_rounding": not stochastic,
        "disable_2d_quantization": not square,
        "row_scaled_activation": False,
        "nvfp4_4over6": "none",
    } | _backward(recipe)


TRANSLATIONS: dict[Scaling, Callable[[Recipe], Translation | None]] = {
    DELAYED: _delayed,
    PER_TENSOR: _current,
    MXFP8_SCALING: _mxfp8,
    NVFP4_SCALING: _nvfp4,
}


def _products(recipe: Recipe) -> tuple[Any, Any, Any]:
    return recipe.forward, recipe.input_gradient, recipe.weight_gradient


def _is(recipe: Recipe, template: Recipe) -> bool:
    """Whether the products are the template's, or only its forward product."""
    return _products(recipe) in (_products(template), (template.forward, None, None))


def _backward(recipe: Recipe) -> dict[str, str | None]:
    """The library's argument for gradients that are left in bfloat16."""
    return {"backward_override": None if recipe.input_gradient else "high_precision"}


def computes(recipe: Recipe) -> bool:
    """Whether TransformerEngine computes exactly this recipe, on some GPU."""
    return te_arguments(recipe) is not None


def load(recipe: Recipe, gpu: str, capability: Capability) -> PrecisionBackend:
    """TransformerEngine for ``recipe`` on a GPU called ``gpu``.

    Raises:
        UserError: GPU or library cannot run exactly this recipe, or the library is missing.
    """
    require_features(recipe, gpu, capability)
    found = te_arguments(recipe)
    if found is None:
        other = "use --backend native" if native.computes(recipe) else "take back a change"
        raise UserError(f"TransformerEngine has no such recipe: {other}, or {EMULATED}")
    try:
        import transformer_engine.pytorch as library
        from transformer_engine.common import recipe as recipes
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"TransformerEngine cannot be loaded ({reason}): pip install --no-build-isolation "
            f"'storylab[te]', {'use --backend native, ' if native.computes(recipe) else ''}or {EMULATED}"
        ) from error
    require_te_version(importlib.metadata.version("transformer-engine"), recipe, capability)
    name, arguments = found
    return TransformerEngine(library, getattr(recipes, name)(**arguments), recipe.alignment)


def require_te_version(version: str, recipe: Recipe, capability: Capability) -> None:
    """Raise a UserError if this version of TransformerEngine gets the recipe wrong on a GeForce card
    (versions before 2.20)."""
    fragile = recipe.hadamard or any(operand.stochastic for operand in recipe.operands)
    number = tuple(int(part) for part in version.split(".")[:2])
    if fragile and capability[0] == GEFORCE_BLACKWELL and number < TE_FOR_GEFORCE:
        raise UserError(
            f"TransformerEngine {version} silently trains NVFP4 wrongly on this card: upgrade it "
            f"to 2.20 or later, use --dtype nvfp4-plain, or {EMULATED}"
        )
