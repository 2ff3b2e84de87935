"""The protocol of precision backends, and the checks that all share. This module does not load torch."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from storylab.config import Backend, ModelConfig
from storylab.errors import UserError
from storylab.precision.features import Capability, device_features
from storylab.precision.recipes import Recipe

if TYPE_CHECKING:
    from torch import nn

EMULATED = "run it emulated with --backend emulated"


class PrecisionBackend(Protocol):
    """A library, loaded and set up to multiply by one recipe."""

    @property
    def name(self) -> Backend:
        """As ``--backend`` has it."""
        ...

    @property
    def alignment(self) -> int:
        """Tokens of a sequence and features of a layer must be multiples of this."""
        ...

    @property
    def compiles(self) -> bool:
        """Whether torch.compile takes its layers."""
        ...

    def layer(self, linear: nn.Linear) -> nn.Module:
        """A module that computes ``linear`` without bias by the recipe, with the same weight."""
        ...

    def context(self) -> AbstractContextManager[Any]:
        """Context manager for the model's forward pass."""
        ...


class BackendEntry(Protocol):
    """A backend as the registry has it: a module with these two functions."""

    def computes(self, recipe: Recipe) -> bool:
        """Whether the library computes exactly this recipe, on some GPU; loads nothing."""
        ...

    def load(self, recipe: Recipe, gpu: str, capability: Capability) -> PrecisionBackend:
        """Set the library up for ``recipe`` on a GPU called ``gpu``.

        Raises:
            UserError: GPU or library cannot run exactly this recipe, or the library is missing.
        """
        ...


def without_block_choice(recipe: Recipe) -> Recipe:
    """The recipe of one layer: without the choice of blocks, and without a Hadamard transform that
    no product uses."""
    hadamard = recipe.hadamard and recipe.weight_gradient is not None
    return dataclasses.replace(recipe, high_first=0, high_last_share=0.0, hadamard=hadamard)


def require_features(recipe: Recipe, gpu: str, capability: Capability) -> None:
    """Raise a UserError that lists the GPU's abilities, unless it has all that the recipe needs."""
    missing = recipe.missing_features(capability)
    if not missing:
        return
    able = device_features(capability)
    can = f"it can train in {', '.join(able)}" if able else "it has no low precision to train in"
    raise UserError(
        f"{gpu} (compute capability {capability[0]}.{capability[1]}) cannot train in "
        f"{' and '.join(missing)}: {can}; or {EMULATED}"
    )


def require_aligned(backend: PrecisionBackend, model: ModelConfig, tokens: int) -> None:
    """Raise a UserError unless the backend takes sequences of ``tokens`` in this model."""
    sizes = {
        "tokens in a sequence": tokens,
        "n_embd": model.n_embd,
        "n_hidden": model.n_hidden,
        "query, key and value features": model.qkv_size,
    }
    for name, size in sizes.items():
        if size % backend.alignment:
            raise UserError(
                f"{name}: {size} is not a multiple of {backend.alignment}, which "
                f"{backend.name} needs for this recipe: change it, or {EMULATED}"
            )
