"""Read ``[factors]`` of an experiment file: the factors, their crossed cells as arms, and checks.

Every function raises a UserError that names the factor if it cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from storylab.config import TrainConfig, current_name
from storylab.errors import UserError
from storylab.experiments.factorial import Factor, Factorial, design_cells
from storylab.experiments.factors import (
    FACTORS,
    changed_fields,
    factor_fields,
    infer_factor,
    unexplained,
)
from storylab.experiments.tables import get_tables, get_typed, listed

Arms = dict[str, dict[str, Any]]
# Fields that set others.
SETTING = {"preset": FACTORS["size"], "method": FACTORS["method"]}


def read_factorial(table: dict[str, Any]) -> tuple[Factorial | None, Arms]:
    """The design of ``[factors]`` with the changes of every cell; without that table, ``[arms]``."""
    tables = get_tables(table, "factors")
    fraction = get_typed(table, "fraction", int, 1)
    if not tables:
        if "fraction" in table:
            raise UserError(
                "fraction is the share of the cells of [factors], which it does not have"
            )
        return None, get_tables(table, "arms")
    for key in ("arms", "factor", "baseline"):
        if table.get(key):
            raise UserError(
                f"it has [factors] and {key}: the arms of a factorial experiment are its cells, and the "
                "baseline is that of all first levels"
            )
    factors, changes = [], []
    for name, values in tables.items():
        factor, levels = _read_factor(name, values)
        factors.append(factor)
        changes.append(levels)
    _require_own_fields(factors)
    factorial = Factorial(tuple(factors), fraction, design_cells(len(factors), fraction))
    arms: Arms = {}
    for cell in factorial.cells:
        name = factorial.cell_name(cell)
        if name in arms:
            raise UserError(f"two cells have the name '{name}': give the levels other names")
        arms[name] = {
            field: value
            for levels, level in zip(changes, cell, strict=True)
            for field, value in levels[level].items()
        }
    return factorial, arms


def _read_factor(name: str, values: dict[str, Any]) -> tuple[Factor, list[dict[str, Any]]]:
    """A factor, and the changes of its two levels."""
    place = f"factor '{name}'"
    cause = current_name(get_typed(values, "factor", str, ""))
    levels = {key: value for key, value in values.items() if key != "factor"}
    for key, value in levels.items():
        if not isinstance(value, dict):
            raise UserError(f"{place}: level '{key}' must be a table {{...}} of changed values")
    if len(levels) != 2:
        raise UserError(f"{place} has {len(levels)} levels: it needs two, the base first")
    named = {field for changes in levels.values() for field in changes}
    known = factor_fields(cause) if cause else None
    if known is not None and (extra := named - known):
        raise UserError(f"{place} changes {listed(extra)}, which '{cause}' does not cover")
    if named and known is None and infer_factor(named) is None:
        raise UserError(
            f"{place} changes {listed(named)}, which no single factor covers: make it several factors, "
            'or name a wider one with factor = "method"'
        )
    fields = named.union(*(SETTING.get(field, frozenset()) for field in named))
    base, other = levels
    return Factor(name, (base, other), tuple(sorted(fields))), list(levels.values())


def _require_own_fields(factors: Iterable[Factor]) -> None:
    owners: dict[str, str] = {}
    for factor in factors:
        for field in factor.fields:
            if field in owners:
                raise UserError(
                    f"factors '{owners[field]}' and '{factor.name}' both change {field}: every factor "
                    "needs fields of its own"
                )
            owners[field] = factor.name


def check_levels(
    factorial: Factorial,
    arms: Arms,
    condition: Mapping[str, Any],
    config: Callable[[Mapping[str, Any], str], TrainConfig],
) -> None:
    """Check that the second level of every factor, alone, changes its own fields and no others.

    Args:
        factorial: the design.
        arms: the changes of every cell.
        condition: the settings under which all of them are trained.
        config: makes a config of changed values; its second argument names the place in an error.
    """
    base = {**condition, **next(iter(arms.values()))}
    second = {
        i: arms[factorial.cell_name(cell)]
        for cell in factorial.cells
        for i, level in enumerate(cell)
        if level
    }
    for i, factor in enumerate(factorial.factors):
        place = f"factor '{factor.name}', level '{factor.levels[1]}'"
        kept = {k: v for k, v in base.items() if k not in factor.fields}
        own = {k: v for k, v in second[i].items() if k in factor.fields}
        a, b = config(base, place), config(kept | own, place)
        if not changed_fields(a, b):
            raise UserError(f"{place} changes nothing: it has the same result as the base")
        if extra := set(unexplained(a, b, frozenset(factor.fields))):
            raise UserError(f"{place} changes {listed(extra)} besides {listed(factor.fields)}")
