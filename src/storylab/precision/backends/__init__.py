"""Backends that compute low precision in hardware; a backend is one module in :data:`BACKENDS`.

The libraries are optional and need an NVIDIA GPU. A recipe either runs exactly as it is named, or
is refused with a message that lists the recipes of this GPU. This package does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from storylab.errors import UserError
from storylab.precision.backends import te, torchao
from storylab.precision.backends.protocol import BackendEntry, PrecisionBackend
from storylab.precision.recipes import Recipe

if TYPE_CHECKING:
    import torch

BACKENDS: dict[str, BackendEntry] = {"te": te, "torchao": torchao}


def has_backend(recipe: Recipe) -> bool:
    """Whether any backend computes exactly this recipe, on some GPU."""
    return any(backend.computes(recipe) for backend in BACKENDS.values())


def resolve_backend(device: torch.device, recipe: Recipe, backend: str) -> PrecisionBackend | None:
    """The backend that computes ``recipe`` on ``device``; None for emulation.

    ``auto`` is TransformerEngine on a GPU and emulation elsewhere. Neither replaces the other when it is
    missing.

    Raises:
        UserError: the backend cannot run the recipe here.
    """
    if backend == "emulated" or (backend == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise UserError(f"--backend {backend} needs an NVIDIA GPU: leave it out to emulate")
    import torch

    chosen = BACKENDS["te" if backend == "auto" else backend]
    gpu, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return chosen.load(recipe, gpu, capability)
