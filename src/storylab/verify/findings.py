"""The findings of a verification, and the type of a check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from storylab.errors import UserError

Subject = TypeVar("Subject")
Depth = Literal["record", "files", "weights"]
DEPTHS: tuple[Depth, ...] = ("record", "files", "weights")
Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the parts done and all of them."""


@dataclass(frozen=True)
class Difference:
    """Something in a file that is not as it should be."""

    file: str
    message: str


@dataclass(frozen=True)
class Gap:
    """Something that could not be checked."""

    reason: str


Finding = Difference | Gap


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """One check; a check is one entry in a list of :mod:`storylab.verify.checks`.

    Attributes:
        name: one or two words, for output and documents.
        recomputes: what is recomputed from what, for the list of checks.
        files: the files that it covers.
        find: the differences; a UserError becomes one.
        depth: the least depth that includes it.
    """

    name: str
    recomputes: str
    files: str
    find: Callable[[Subject], Iterator[Finding]]
    depth: Depth = "record"


def included(depth: Depth, least: Depth) -> bool:
    """Whether a verification of ``depth`` includes checks of depth ``least``."""
    return DEPTHS.index(depth) >= DEPTHS.index(least)


def fault_difference(error: UserError, files: tuple[str, ...]) -> Difference:
    """The difference that an error is, in the first of ``files`` that it names."""
    message = str(error)
    return Difference(next((name for name in files if name in message), ""), message)


def unequal(
    file: str, name: str, recorded: object, computed: object, source: str, exact: bool = False
) -> Iterator[Difference]:
    """A difference if a recorded value is not the computed one, up to rounding unless ``exact``.

    Args:
        file: where the value is recorded.
        name: of the value in it.
        recorded: the value there.
        computed: the value from ``source``.
        source: what it was computed from, in a few words.
        exact: whether floats must be equal to the last bit.
    """
    same = recorded == computed
    if not exact and isinstance(recorded, float) and isinstance(computed, float):
        same = close(recorded, computed)
    if not same:
        yield Difference(file, f"{name} is {recorded}, but {computed} from {source}")


def close(recorded: float, computed: float) -> bool:
    """Whether two floats differ by rounding alone, as it depends on the machine."""
    return math.isclose(recorded, computed, rel_tol=1e-9)
