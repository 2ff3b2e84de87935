"""Backends that compute low precision in hardware; a backend is one module in :data:`BACKENDS`.

They need an NVIDIA GPU; the libraries are optional, torch's own products are always there. A recipe
either runs exactly as it is named, or is refused with a message that lists the recipes of this GPU.
This package does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from storylab.errors import UserError
from storylab.precision.backends import native, te, torchao
from storylab.precision.backends.protocol import BackendEntry, PrecisionBackend
from storylab.precision.recipes import Recipe

if TYPE_CHECKING:
    import torch

BACKENDS: dict[str, BackendEntry] = {"te": te, "torchao": torchao, "native": native}


def has_backend(recipe: Recipe) -> bool:
    """Whether any backend computes exactly this recipe, on some GPU."""
    return any(backend.computes(recipe) for backend in BACKENDS.values())


def resolve_backend(device: torch.device, recipe: Recipe, backend: str) -> PrecisionBackend | None:
    """The backend that computes ``recipe`` on ``device``; None for emulation.

    ``auto`` is TransformerEngine on a GPU and emulation elsewhere. Neither replaces the other when it is
    missing. TransformerEngine comes first, as it has most recipes, and as nobody has compared it with
    torch's own products on a GPU.

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
