"""The language of ``--recipe``: find a recipe by name and make changes to it."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from storylab.errors import UserError
from storylab.precision.formats import FORMATS
from storylab.precision.recipes import ALIASES, OPTIONS, PRODUCTS, RECIPES, Operand, Recipe
from storylab.precision.scalings import SCALINGS

# Powers of two of a scale that a float32 can spare.
MOST_MARGIN = 64


def find_recipe(name: str, changes: str = "") -> Recipe | None:
    """The recipe of a dtype with ``changes`` made to it; None for a dtype that has none.

    A change is ``FIELD=VALUE`` for a field of :class:`Recipe`, ``PRODUCT=bfloat16`` to leave a
    product in bfloat16, or ``PRODUCT.OPERAND.FIELD=VALUE`` for a field of :class:`Operand`; ``*``
    means every product or operand that exists, as in ``*.gradient.stochastic=false``.

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
    if problem := _problem(recipe):
        raise UserError(f"recipe changes '{changes}': {problem}")
    return recipe


def _problem(recipe: Recipe) -> str | None:
    """The first field of a recipe that has no effect or an impossible value, or None."""
    for operand in recipe.operands:
        if problem := _operand_problem(operand):
            return problem
    if not recipe.delayed and (recipe.margin or recipe.history != Recipe.history):
        return "margin and history are for delayed scaling"
    if recipe.margin > MOST_MARGIN:
        return f"margin must be at most {MOST_MARGIN}: it is a power of two"
    return "history must be at least 1" if recipe.history < 1 else None


def _operand_problem(operand: Operand) -> str | None:
    form, scaling = operand.format, operand.scaling
    if form not in scaling.formats:
        if len(scaling.formats) == 1:
            only = scaling.formats[0].name
            return f"{scaling.name} scaling is for {only} elements: change scaling too"
        able = " or ".join(s.name for s in SCALINGS.values() if form in s.formats)
        return f"{form.name} elements need {able} scaling, not {scaling.name}"
    for option in OPTIONS:
        if getattr(operand, option) and option not in scaling.options:
            able = " or ".join(s.name for s in SCALINGS.values() if option in s.options)
            return f"{option} is for {able} scaling, not {scaling.name}"
    return None


def _changed(recipe: Recipe, change: str) -> Recipe:
    path, mark, value = change.partition("=")
    parts = path.split(".")
    if not mark or len(parts) not in (1, 3):
        raise UserError(
            f"recipe change '{change}': write FIELD=VALUE or PRODUCT.OPERAND.FIELD=VALUE, such as "
            "hadamard=false or forward.weight.square=false"
        )
    if len(parts) == 3:
        return _with_operands_changed(recipe, parts, value, change)
    if path in PRODUCTS:
        if value != "bfloat16":
            raise UserError(f"recipe change '{change}': a product as a whole can be bfloat16 only")
        nothing: dict[str, Any] = {path: None}
        return dataclasses.replace(recipe, **nothing)
    return dataclasses.replace(recipe, **{path: _parsed(Recipe, path, value, change)})


def _with_operands_changed(recipe: Recipe, parts: list[str], value: str, change: str) -> Recipe:
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


# Values of the fields that are not numbers, by the field's type.
CHOICES: dict[str, dict[str, Any]] = {
    "bool": {"true": True, "false": False},
    "Format": FORMATS,
    "Scaling": SCALINGS,
}


def _parsed(kind: type[Any], name: str, value: str, change: str) -> Any:
    """``value`` as the type of the field ``name`` of ``kind``."""
    types = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    simple = {k: v for k, v in types.items() if "|" not in v}
    _one_of(name, list(simple), change)
    if choices := CHOICES.get(simple[name]):
        _one_of(value, list(choices), change)
        return choices[value]
    try:
        number = int(value) if simple[name] == "int" else float(value)
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
