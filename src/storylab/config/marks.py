"""Facts about a config field, carried by its type: ``Annotated[int, mark("batch", checks=COUNT)]``.

Every list of fields is derived from them: the fields that a factor of an experiment covers, those that the
name of a run's folder leaves out, that a resumed run may change, that a report hides. The parser of flags
ignores them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, cast, get_type_hints

from storylab.decode import shown
from storylab.errors import UserError

Group = Literal[
    "preset",
    "size",
    "shape",
    "method",
    "data",
    "precision",
    "length",
    "batch",
    "sequence",
    "schedule",
    "optimizer",
    "step",
    "evaluation",
    "record",
    "machine",
    "seed",
]
"""A part of the recipe that fields belong to. ``size``: how large the model is; ``shape``: its other
choices; ``method``: choices that a named method makes, besides those of schedule and optimizer; ``length``:
how long a run is; ``sequence``: the length of a window; ``step``: every optimizer's step; ``record``: where
and how often a run writes."""
Effect = Literal["result and speed", "result", "presentation"]
"""The things that a field can change: the result together with a step's time or memory; the result
alone; or neither, so that a resumed run may change it."""
Check = Callable[[str, Any], None]
"""Raises a UserError if the field of a name cannot have a value."""

# More than any machine counts to; products of two still fit into a float, sums into 64 bits.
MOST = 10**15
# About the range of a float32.
LARGEST_RATE = 1e38


class _Always:
    """Of a field that the first runs had already."""


ALWAYS = _Always()


@dataclass(frozen=True)
class Marks:
    """The facts about a field.

    Attributes:
        groups: groups that it belongs to.
        checks: of its value; None is not checked.
        effect: see :data:`Effect`.
        before: value that runs had before the field existed. A run that has it keeps its digest of then.
        weights: whether the field adds or reshapes weights. Weights of the same name and shape begin the
            same.
        by_length: words for the thing that moves with the length of a run, unless the field is as
            ``before``; empty where nothing does.
        set_by: words for where an experiment sets the field; empty where an arm may.
        formerly: name that the field had in earlier versions; empty if it had no other. Files and flags
            with it still read, and digests are computed with it.
    """

    groups: frozenset[Group]
    checks: tuple[Check, ...]
    effect: Effect
    before: Any
    weights: bool
    by_length: str
    set_by: str
    formerly: str


def mark(
    *groups: Group,
    checks: tuple[Check, ...] = (),
    effect: Effect = "result and speed",
    before: Any = ALWAYS,
    weights: bool = False,
    by_length: str = "",
    set_by: str = "",
    formerly: str = "",
) -> Marks:
    """The marks of a field of ``groups``; :class:`Marks` explains the other facts.

    A new field needs ``before``, or every run would get another digest.
    """
    return Marks(frozenset(groups), checks, effect, before, weights, by_length, set_by, formerly)


def marks_of(kind: type[Any]) -> dict[str, Marks]:
    """The marks of every field of a config class by name, in order; a nested config has none.

    Raises:
        TypeError: a field has no marks.
    """
    return _marks_of(cast(Hashable, kind))


@cache
def _marks_of(kind: Any) -> dict[str, Marks]:
    hints = get_type_hints(kind, include_extras=True)
    found: dict[str, Marks] = {}
    for field in dataclasses.fields(kind):
        marks = [m for m in getattr(hints[field.name], "__metadata__", ()) if isinstance(m, Marks)]
        if marks:
            (found[field.name],) = marks
        elif not dataclasses.is_dataclass(hints[field.name]):
            raise TypeError(f"{kind.__name__}.{field.name} has no mark")
    return found


def check_fields(config: Any) -> None:
    """Check every field of a config by itself.

    Raises:
        UserError: a value makes no sense.
    """
    for name, marks in marks_of(type(config)).items():
        value = getattr(config, name)
        if value is not None:
            for check in marks.checks:
                check(name, value)


def at_least(minimum: float, name: str, value: float) -> None:
    """Raise a UserError if a number is under ``minimum``, infinite, or not a number."""
    # "not >=" rather than "<" so that NaN is refused too.
    if not value >= minimum or value == float("inf"):
        raise UserError(
            f"{name} is {shown(value)}: it must be a finite number of at least {minimum}"
        )


def at_most(maximum: int, name: str, value: int) -> None:
    """Raise a UserError if a whole number is over ``maximum``."""
    if value > maximum:
        raise UserError(f"{name} is {shown(value)}: it must be at most {maximum:,}")


def check_seed(name: str, value: int) -> None:
    """Raise a UserError unless ``value`` is a seed that torch takes."""
    if not 0 <= value < 2**63:
        raise UserError(f"{name} is {shown(value)}: it must be from 0 to 2^63 - 1")


def _float32(name: str, value: float) -> None:
    if value > LARGEST_RATE:
        raise UserError(f"{name} is {value}: it must be at most 1e38")


def _decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"{name} is {value}: it must be in [0, 1)")


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}: it must be a share, 0 to 1")


COUNT: tuple[Check, ...] = (partial(at_least, 1), partial(at_most, MOST))
COUNT_OR_NONE: tuple[Check, ...] = (partial(at_least, 0), partial(at_most, MOST))
NUMBER: tuple[Check, ...] = (partial(at_least, 0),)
RATE: tuple[Check, ...] = (*NUMBER, _float32)
DECAY: tuple[Check, ...] = (_decay,)
SHARE: tuple[Check, ...] = (_share,)
SEED: tuple[Check, ...] = (check_seed,)
