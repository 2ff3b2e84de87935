"""Precision recipes as data: which operand of which product is quantised, how, and what is left alone.

A linear layer y = x W' has three products: forward (x, W), input gradient (dy, W) and weight gradient
(dy, x). Blocks always lie along the axis that a product sums over. A recipe is one entry.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal, get_args

from storylab.errors import UserError
from storylab.precision.formats import FORMATS

Scaling = Literal["delayed", "tensor", "row", "mxfp8", "nvfp4"]


@dataclass(frozen=True)
class Operand:
    """How one operand of a product is quantised."""

    format: Literal["e4m3", "e5m2", "e2m1"]
    scaling: Scaling
    square: bool = False
    """16 x 16 blocks instead of 1 x 16 (nvfp4)."""
    stochastic: bool = False
    """Rounding by chance instead of to nearest (nvfp4)."""
    four_over_six: bool = False
    """Blocks scaled to 4 instead of 6 where that errs less (nvfp4)."""

    @property
    def whole_tensor(self) -> bool:
        """Whether one scale covers the tensor, so that its transpose is quantised alike."""
        return self.scaling in ("delayed", "tensor")


@dataclass(frozen=True)
class Recipe:
    """The operands of the three products; None leaves both operands of a product in bfloat16.

    Embedding, head, norms and attention products are never quantised.
    """

    forward: tuple[Operand, Operand] | None
    """Input and weight."""
    input_gradient: tuple[Operand, Operand] | None
    """Output gradient and weight."""
    weight_gradient: tuple[Operand, Operand] | None
    """Output gradient and input."""
    hadamard: bool = False
    """Random Hadamard transform of the weight gradient's operands."""
    high_first: int = 0
    """First blocks that stay in bfloat16."""
    high_last_share: float = 0.0
    """Share of the blocks, counted from the last, that stay in bfloat16; rounded up."""
    low_forward_share: float = 1.0
    """Share of the iterations after which the forward products are in bfloat16."""
    history: int = 1024
    """Past steps whose largest magnitude a delayed scale is made from."""
    margin: int = 0
    """Powers of two that a delayed scale stays below the format's range."""

    @property
    def operands(self) -> list[Operand]:
        """Every quantised operand."""
        products = (self.forward, self.input_gradient, self.weight_gradient)
        return [operand for operands in products if operands for operand in operands]

    @property
    def delayed(self) -> bool:
        """Whether any operand's scale comes from the steps before."""
        return any(operand.scaling == "delayed" for operand in self.operands)

    @property
    def one_gradient(self) -> bool:
        """Whether both gradient products see the output gradient quantised alike."""
        if self.input_gradient is None or self.weight_gradient is None or self.hadamard:
            return False
        first, second = self.input_gradient[0], self.weight_gradient[0]
        return first == second and first.whole_tensor

    @property
    def form(self) -> Literal["fp8", "fp4"]:
        """What hardware multiplies: FP4 where any operand is E2M1, else FP8."""
        return "fp4" if any(o.format == "e2m1" for o in self.operands) else "fp8"

    @property
    def low_products(self) -> float:
        """How many of a quantised layer's three products are, the mean over the iterations."""
        count = float(sum(getattr(self, product) is not None for product in PRODUCTS))
        return count - (1 - self.low_forward_share if self.forward else 0.0)

    def low_blocks(self, layers: int) -> range:
        """Indices of the blocks whose linear layers are quantised."""
        last = -(-round(self.high_last_share * layers * 1e6) // 10**6)
        return range(min(self.high_first, layers), max(layers - last, 0))


def _fp8(scaling: Scaling) -> Recipe:
    """E4M3 forward and E5M2 for gradients (Micikevicius et al. 2022, arXiv 2209.05433)."""
    forward, gradient = Operand("e4m3", scaling), Operand("e5m2", scaling)
    return Recipe((forward, forward), (gradient, forward), (gradient, forward))


_ROW = Operand("e4m3", "row")
_MX = Operand("e4m3", "mxfp8")
_NV = Operand("e2m1", "nvfp4")
_NV_WEIGHT = Operand("e2m1", "nvfp4", square=True)
_NV_GRADIENT = Operand("e2m1", "nvfp4", stochastic=True)
_NVFP4 = Recipe(
    (_NV, _NV_WEIGHT),
    (_NV_GRADIENT, _NV_WEIGHT),
    (_NV_GRADIENT, _NV),
    hadamard=True,
    high_last_share=0.15,
)

RECIPES: dict[str, Recipe] = {
    "fp8": _fp8("delayed"),
    "fp8-current": _fp8("tensor"),
    # torchao's "rowwise".
    "fp8-rowwise": Recipe((_ROW, _ROW), (_ROW, _ROW), (_ROW, _ROW)),
    # Mishra et al. 2025, arXiv 2506.08027: E4M3 for gradients too, scales rounded up.
    "mxfp8": Recipe((_MX, _MX), (_MX, _MX), (_MX, _MX)),
    # NVIDIA 2025, arXiv 2509.25149.
    "nvfp4": _NVFP4,
    # Without what GeForce cards have no instructions for.
    "nvfp4-plain": Recipe(
        (_NV, _NV_WEIGHT), (_NV, _NV_WEIGHT), (_NV, _NV), high_last_share=_NVFP4.high_last_share
    ),
}
# Binary orders of a scale that a float32 can spare.
MOST_MARGIN = 64
ALIASES = {"fp4": "nvfp4", "nvf4": "nvfp4"}
PRODUCTS = {
    "forward": ("input", "weight"),
    "input_gradient": ("gradient", "weight"),
    "weight_gradient": ("gradient", "input"),
}


def find_recipe(name: str, changes: str = "") -> Recipe | None:
    """The recipe of a dtype with ``changes`` made to it; None for a dtype that has none.

    A change is ``FIELD=VALUE`` for a field of :class:`Recipe`, ``PRODUCT=bfloat16`` to leave a
    product alone, or ``PRODUCT.OPERAND.FIELD=VALUE`` for a field of :class:`Operand`; ``*`` stands for
    every product or operand that there is, as in ``*.gradient.stochastic=false``.

    Raises:
        UserError: a change cannot be understood, or there is no recipe to change.
    """
    recipe = RECIPES.get(ALIASES.get(name, name))
    if recipe is None:
        if changes:
            raise UserError(f"dtype {name} has no recipe to change: leave --recipe out")
        return None
    for change in changes.split():
        recipe = _changed(recipe, change)
    if fault := _fault(recipe):
        raise UserError(f"recipe changes '{changes}': {fault}")
    return recipe


def _fault(recipe: Recipe) -> str | None:
    """What in a recipe would be without effect, or cannot be, or None."""
    for operand in recipe.operands:
        if operand.scaling == "nvfp4" and operand.format != "e2m1":
            return "nvfp4 scaling is for e2m1 elements: change scaling too"
        if operand.scaling != "nvfp4" and operand.format == "e2m1":
            return f"e2m1 elements need nvfp4 scaling, not {operand.scaling}"
        for name in ("square", "stochastic", "four_over_six"):
            if getattr(operand, name) and operand.scaling != "nvfp4":
                return f"{name} is for nvfp4 scaling, not {operand.scaling}"
    if not recipe.delayed and (recipe.margin or recipe.history != Recipe.history):
        return "margin and history are for delayed scaling"
    if recipe.margin > MOST_MARGIN:
        return f"margin must be at most {MOST_MARGIN}: it is a power of two"
    return "history must be at least 1" if recipe.history < 1 else None


def _changed(recipe: Recipe, change: str) -> Recipe:
    path, mark, value = change.partition("=")
    parts = path.split(".")
    if not mark or len(parts) not in (1, 3):
        raise UserError(
            f"recipe change '{change}': write FIELD=VALUE or PRODUCT.OPERAND.FIELD=VALUE, such as "
            "hadamard=false or forward.weight.square=false"
        )
    if len(parts) == 1:
        if path in PRODUCTS:
            if value != "bfloat16":
                raise UserError(
                    f"recipe change '{change}': a product as a whole can be bfloat16 only"
                )
            nothing: dict[str, Any] = {path: None}
            return dataclasses.replace(recipe, **nothing)
        return dataclasses.replace(recipe, **{path: _parsed(Recipe, path, value, change)})
    product, operand, name = parts
    _one_of(product, ["*", *PRODUCTS], change)
    _one_of(operand, ["*", "input", "weight", "gradient"], change)
    parsed = _parsed(Operand, name, value, change)
    changed: dict[str, Any] = {}
    touched = False
    for key, operands in PRODUCTS.items():
        pair = getattr(recipe, key)
        if product not in ("*", key) or pair is None:
            continue
        chosen = [operand in ("*", role) for role in operands]
        touched |= any(chosen)
        changed[key] = tuple(
            dataclasses.replace(old, **{name: parsed}) if hit else old
            for old, hit in zip(pair, chosen, strict=True)
        )
    if not touched:
        raise UserError(f"recipe change '{change}' fits no operand of this recipe")
    return dataclasses.replace(recipe, **changed)


def _parsed(kind: type[Any], name: str, value: str, change: str) -> Any:
    """``value`` as the type of the field ``name`` of ``kind``."""
    types = {f.name: f.type for f in dataclasses.fields(kind)}
    simple = {k: v for k, v in types.items() if "|" not in str(v)}
    _one_of(name, list(simple), change)
    known: dict[str, list[Any]] = {
        "bool": [True, False],
        "Scaling": list(get_args(Scaling)),
        "format": list(FORMATS),
    }
    kind_name = "format" if name == "format" else str(simple[name])
    if kind_name in known:
        choices = {str(choice).lower(): choice for choice in known[kind_name]}
        _one_of(value, list(choices), change)
        return choices[value]
    try:
        number = int(value) if kind_name == "int" else float(value)
    except ValueError:
        raise UserError(f"recipe change '{change}': {name} must be a number") from None
    if not 0 <= number < 2**20 or (name.endswith("share") and number > 1):
        raise UserError(f"recipe change '{change}': {name} is out of range")
    return number


def _one_of(name: str, choices: list[str], change: str) -> None:
    if name not in choices:
        close = difflib.get_close_matches(name, choices, n=1)
        hint = f"perhaps you meant {close[0]}" if close else f"use one of {', '.join(choices)}"
        raise UserError(f"recipe change '{change}': there is no '{name}': {hint}")
