"""The compute policy of a run: its device and precision, checked before any work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from storylab.config import Backend, Dtype
from storylab.errors import UserError
from storylab.precision.backends import resolve_backend
from storylab.precision.backends.protocol import PrecisionBackend
from storylab.precision.edit import find_recipe
from storylab.precision.recipes import Recipe

# Products that a recipe leaves alone are computed in bfloat16.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Keys in a block of flash attention's backward pass. Heads above 64 have half as many on some cards.
FLASH_BLOCK = 128
# NVIDIA's tensor cores have bfloat16 from this compute capability on (Ampere).
BFLOAT16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class ComputePolicy:
    """Where and in which precision a run computes. Weights stay float32.

    Attributes:
        device: device of the model.
        dtype: of the matrix products.
        recipe: of the linear layers' products, where those are lower still.
        hardware: computes the recipe; None where it is emulated.
    """

    device: torch.device
    dtype: torch.dtype
    recipe: Recipe | None = None
    hardware: PrecisionBackend | None = None

    @property
    def backend(self) -> Backend:
        """Name of the backend that computes the recipe, or emulated; auto without a recipe."""
        if self.recipe is None:
            return "auto"
        return "emulated" if self.hardware is None else self.hardware.name

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Context in which matrix products run in ``dtype``, those of quantized layers lower."""
        enabled = self.dtype != torch.float32
        # No cache of cast weights: every weight is used once in a pass, so it would only hold memory.
        wide = torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False)
        with wide, self.hardware.context() if self.hardware else nullcontext():
            yield

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaler; does something for float16 only, whose gradients would underflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def choose_device(name: str) -> torch.device:
    """The device called ``name``; auto is CUDA if the machine has it, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}': use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device (or a CPU build of torch): use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"no {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("no MPS device here: use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device '{name}' is not supported: use cpu, cuda or mps")
    if device.type == "cuda":
        # cuDNN builds a plan for every new shape, 0.04 to 0.4 s each on an H100: 12 tok/s of sampling
        # instead of 71. In training at 128 tokens flash attention takes as long, at 512 half as long.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def require_same_bits(device: torch.device, block_size: int, head_size: int) -> None:
    """Let a step on a CUDA device give the same bits whenever it is repeated.

    Flash attention's backward pass adds up blocks of 128 or 64 keys in the order in which they become
    ready, unless torch uses its deterministic kernels. A single block has no order
    (docs/performance.md).
    """
    if device.type != "cuda":
        return
    several = block_size > (FLASH_BLOCK if head_size <= 64 else FLASH_BLOCK // 2)
    torch.use_deterministic_algorithms(
        several
    )  # with warnings alone, flash attention would not change
    if several:
        # New tensors are written before they are read here, so filling them would be for nothing.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def choose_precision(
    device: torch.device, dtype: Dtype, changes: str = "", backend: Backend = "auto"
) -> ComputePolicy:
    """The compute policy of a run.

    Args:
        device: where it computes.
        dtype: name of a dtype or of a recipe.
        changes: to the recipe of a low-precision dtype.
        backend: name of the backend that computes the recipe.

    Raises:
        UserError: the device has no matrix products in ``dtype``, the backend cannot run the recipe
            there, or the changes make no sense.
    """
    recipe = find_recipe(dtype, changes)
    if recipe is None and backend != "auto":
        raise UserError(f"--backend is for low precision: leave it out with {dtype}")
    wide = high_precision(device, dtype).dtype
    hardware = resolve_backend(device, recipe, backend) if recipe is not None else None
    return ComputePolicy(device, wide, recipe, hardware)


def high_precision(device: torch.device, dtype: Dtype) -> ComputePolicy:
    """The policy of products that a recipe leaves alone: a low-precision dtype counts as bfloat16.

    Raises:
        UserError: the device has no such matrix products.
    """
    wide = TORCH_DTYPES.get(dtype, torch.bfloat16)
    if device.type == "cuda" and wide == torch.bfloat16:
        capability = torch.cuda.get_device_capability(device)
        if capability < BFLOAT16_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise UserError(f"{name} has no bfloat16: use --dtype float16 or --dtype float32")
    return ComputePolicy(device, wide)
