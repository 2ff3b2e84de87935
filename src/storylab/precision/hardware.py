"""Low precision computed by the hardware: what a card can do, and the two libraries that drive it.

The libraries are optional and need an NVIDIA GPU; nothing here has been measured on one. Either a
recipe runs as it is named or it is refused with what the card can do instead.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from storylab.config import Backend, ModelConfig
from storylab.errors import UserError
from storylab.precision.linear import QuantizationState
from storylab.precision.recipes import Recipe, find_recipe

Capability = tuple[int, int]
EMULATED = "run it emulated with --backend emulated"
# What is told apart when a card is asked: element formats, MXFP8's block scales and NVFP4.
FP8, MXFP8, NVFP4 = "FP8", "MXFP8", "NVFP4"
ADA: Capability = (8, 9)
# TransformerEngine 2.20, docs/features/low_precision_training: "Training: SM 10.0, SM 10.3".
DATACENTER_BLACKWELL: tuple[Capability, ...] = ((10, 0), (10, 3))
GEFORCE_BLACKWELL = 12
# Before it (NVIDIA/TransformerEngine pull request 3281) stochastic rounding on compute capability 12
# returned zeros and raised nothing; Hadamard transforms failed there before 2.14 (2968).
TE_FOR_GEFORCE = (2, 20)


class Hardware(Protocol):
    """A library that multiplies in low precision."""

    @property
    def name(self) -> Backend:
        """As ``--backend`` has it."""
        ...

    @property
    def alignment(self) -> int:
        """Tokens of a sequence and features of a layer must be multiples of this."""
        ...

    def layer(self, linear: nn.Linear) -> nn.Module:
        """A module that computes ``linear`` without bias by the recipe, with the same weight."""
        ...

    def context(self) -> AbstractContextManager[Any]:
        """What the model's forward pass runs in."""
        ...


class HardwareLinear(nn.Module):
    """A linear layer without bias that the hardware multiplies; ``weight`` is the one it was made of.

    The library's own module is kept out of the module tree: its private state, which some pickle,
    stays out of checkpoints, and parameters keep their names.
    """

    def __init__(self, layer: nn.Linear, hardware: Hardware, state: QuantizationState) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.state = state
        self._kernel = (hardware.layer(layer),)

    def forward(self, input: Tensor) -> Tensor:
        if not self.state.enabled:
            return nn.functional.linear(input, self.weight)
        output: Tensor = self._kernel[0](input)
        return output


def families(recipe: Recipe) -> set[str]:
    """What a recipe needs of a card."""
    names = {"delayed": FP8, "tensor": FP8, "row": FP8, "mxfp8": MXFP8, "nvfp4": NVFP4}
    return {names[operand.scaling] for operand in recipe.operands}


def supported(capability: Capability) -> list[str]:
    """What a card of this compute capability can train with."""
    found = [FP8] if capability >= ADA else []
    found += [MXFP8] if capability in DATACENTER_BLACKWELL else []
    blackwell = capability in DATACENTER_BLACKWELL or capability[0] == GEFORCE_BLACKWELL
    return found + ([NVFP4] if blackwell else [])


def require_card(recipe: Recipe, card: str, capability: Capability) -> None:
    """Raise a UserError that says what the card can do, unless it can do what the recipe needs."""
    able = supported(capability)
    missing = sorted(families(recipe) - set(able))
    if missing:
        can = (
            f"it can train in {', '.join(able)}" if able else "it has no low precision to train in"
        )
        raise UserError(
            f"{card} (compute capability {capability[0]}.{capability[1]}) cannot train in "
            f"{' and '.join(missing)}: {can}; or {EMULATED}"
        )


@dataclass(frozen=True)
class TransformerEngine:
    """NVIDIA's TransformerEngine: ``te.Linear`` under ``te.autocast``."""

    library: Any
    recipe: Any
    alignment: int
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


@dataclass(frozen=True)
class Torchao:
    """PyTorch's torchao: its float8 linear layer."""

    convert: Any
    config: Any
    alignment: int = 16
    name: Backend = "torchao"

    def layer(self, linear: nn.Linear) -> nn.Module:
        # A layer of its own with the same weight, as the conversion swaps children of a module.
        plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        plain.weight = linear.weight
        converted: nn.Module = self.convert(nn.Sequential(plain), config=self.config)[0]
        return converted

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()


def te_arguments(recipe: Recipe) -> tuple[str, dict[str, Any]] | None:
    """Class and arguments of the TransformerEngine recipe that computes ``recipe``; None if none
    does. Arguments are complete where the library would else read environment variables."""
    wanted = _core(recipe)
    for name, arguments, candidate in _te_recipes(recipe):
        if candidate == wanted:
            return name, arguments
    return None


def _te_recipes(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any], Recipe]]:
    """TransformerEngine's recipes in words of ours."""
    delayed = {"margin": recipe.margin, "amax_history_len": recipe.history, "reduce_amax": False}
    changed = f"margin={recipe.margin} history={recipe.history}"
    yield "DelayedScaling", delayed | {"backward_override": None}, _named("fp8", changed)
    for backward, change in (
        (None, ""),
        ("high_precision", "input_gradient=bfloat16 weight_gradient=bfloat16"),
    ):
        override = {"backward_override": backward}
        current = {"use_power_2_scales": False} | override
        yield "Float8CurrentScaling", current, _named("fp8-current", change)
        yield "MXFP8BlockScaling", override, _named("mxfp8", change)
        switches = {
            "disable_rht": "hadamard=false",
            "disable_stochastic_rounding": "*.*.stochastic=false",
            "disable_2d_quantization": "*.weight.square=false",
        }
        for chosen in range(8):
            off = {name: bool(chosen >> i & 1) for i, name in enumerate(switches)}
            changes = [text for name, text in switches.items() if off[name]]
            yield (
                "NVFP4BlockScaling",
                off | {"row_scaled_activation": False, "nvfp4_4over6": "none"} | override,
                _named("nvfp4", " ".join([*changes, change])),
            )


def _named(name: str, changes: str) -> Recipe:
    recipe = find_recipe(name, changes)
    assert recipe is not None
    return _core(recipe)


def _core(recipe: Recipe) -> Recipe:
    """The recipe of one layer: without the choice of layers, and what it has no use for."""
    hadamard = recipe.hadamard and recipe.weight_gradient is not None
    return dataclasses.replace(recipe, high_first=0, high_last_share=0.0, hadamard=hadamard)


def te_hardware(recipe: Recipe, card: str, capability: Capability) -> Hardware:
    """TransformerEngine for ``recipe`` on a card.

    Raises:
        UserError: card or library cannot run the recipe as it is, or the library is missing.
    """
    require_card(recipe, card, capability)
    found = te_arguments(recipe)
    if found is None:
        other = "use --backend torchao" if torchao_name(recipe) else "take back a change"
        raise UserError(f"TransformerEngine has no such recipe: {other}, or {EMULATED}")
    try:
        import transformer_engine.pytorch as library
        from transformer_engine.common import recipe as recipes
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"TransformerEngine cannot be loaded ({reason}): pip install --no-build-isolation "
            f"'storylab[te]', or {EMULATED}"
        ) from error
    require_te_version(importlib.metadata.version("transformer-engine"), recipe, capability)
    name, arguments = found
    alignment = 32 if MXFP8 in families(recipe) else 16
    return TransformerEngine(library, getattr(recipes, name)(**arguments), alignment)


def require_te_version(version: str, recipe: Recipe, capability: Capability) -> None:
    """Raise a UserError for what TransformerEngine gets wrong on a GeForce card before 2.20."""
    fragile = recipe.hadamard or any(operand.stochastic for operand in recipe.operands)
    number = tuple(int(part) for part in version.split(".")[:2])
    if fragile and capability[0] == GEFORCE_BLACKWELL and number < TE_FOR_GEFORCE:
        raise UserError(
            f"TransformerEngine {version} trains NVFP4 wrongly on this card, in silence: upgrade it "
            f"to 2.20 or later, use --dtype nvfp4-plain, or {EMULATED}"
        )


TORCHAO_NAMES = {"fp8-current": "tensorwise", "fp8-rowwise": "rowwise"}


def torchao_name(recipe: Recipe) -> str | None:
    """What torchao calls a recipe; None if it has no such one."""
    return next((t for o, t in TORCHAO_NAMES.items() if _named(o, "") == _core(recipe)), None)


def has_library(recipe: Recipe) -> bool:
    """Whether either library computes a recipe as it is, on some card."""
    return te_arguments(recipe) is not None or torchao_name(recipe) is not None


def torchao_hardware(recipe: Recipe, card: str, capability: Capability) -> Hardware:
    """torchao's float8 for ``recipe`` on a card.

    Raises:
        UserError: card or library cannot run the recipe as it is, or the library is missing.
    """
    require_card(recipe, card, capability)
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
    return Torchao(convert_to_float8_training, Float8LinearConfig.from_recipe_name(name))


BACKENDS = {"te": te_hardware, "torchao": torchao_hardware}


def choose_hardware(device: torch.device, recipe: Recipe, backend: str) -> Hardware | None:
    """What computes ``recipe`` on ``device``; None: emulation. ``auto`` is TransformerEngine on a GPU
    and emulation elsewhere, and never one because the other is missing.

    Raises:
        UserError: the backend cannot run the recipe here.
    """
    if backend == "emulated" or (backend == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise UserError(f"--backend {backend} needs an NVIDIA GPU: leave it out to emulate")
    chosen = BACKENDS["te" if backend == "auto" else backend]
    name = torch.cuda.get_device_name(device)
    return chosen(recipe, name, torch.cuda.get_device_capability(device))


def require_aligned(hardware: Hardware, model: ModelConfig, tokens: int) -> None:
    """Raise a UserError unless the hardware takes micro-batches of ``tokens`` in this model."""
    sizes = {
        "tokens in a sequence": tokens,
        "n_embd": model.n_embd,
        "n_hidden": model.n_hidden,
        "query, key and value features": model.qkv_size,
    }
    for name, size in sizes.items():
        if size % hardware.alignment:
            raise UserError(
                f"{name}: {size} is not a multiple of {hardware.alignment}, which "
                f"{hardware.name} needs for this recipe: change it, or {EMULATED}"
            )
