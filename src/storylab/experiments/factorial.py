"""Factorial designs: two-level factors crossed, all cells or a regular fraction of them, and their effects.

With ``k`` factors a full design has ``2^k`` cells; a fraction has ``2^(k-p)``, chosen so that the fewest
effects of low order share an estimate (Box, Hunter and Hunter, Statistics for Experimenters, 2nd ed.,
chapters 5 and 6; fewest by Fries and Hunter 1980, doi 10.1080/00401706.1980.10486210). The first level of
every factor is its base, and the cell of all bases is in every fraction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product

import numpy as np

from storylab.errors import UserError
from storylab.experiments.factors import LENGTH_FIELDS, allowed_fields
from storylab.record.experiment_schema import ExperimentRecord, FactorialRecord

FEWEST_FACTORS, MOST_FACTORS = 2, 8
MOST_CELLS = 128
FRACTIONS = {1: "all cells", 2: "a half fraction", 4: "a quarter fraction", 8: "an eighth fraction"}
ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII")

Levels = tuple[int, ...]
"""Level of every factor in a cell: 0 is the base."""
Word = frozenset[int]
"""Factors whose levels add up to an even number in every cell of a fraction."""


@dataclass(frozen=True)
class Factor:
    """A factor of a factorial experiment.

    Attributes:
        name: as in the file.
        levels: names of its two levels, the base first.
        fields: config fields that it may change.
    """

    name: str
    levels: tuple[str, str]
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Effect:
    """The main effect of a factor, or the interaction of two.

    Attributes:
        factors: indexes of its one or two factors.
        aliases: effects of one or two factors that share its estimate.
    """

    factors: tuple[int, ...]
    aliases: tuple[tuple[int, ...], ...] = ()

    @property
    def scale(self) -> float:
        """Its standard error over that of a main effect: an interaction is a difference of differences."""
        return float(2 ** (len(self.factors) - 1))

    def weights(self, cells: Sequence[Levels]) -> np.ndarray:
        """Weights whose sum with the cells' losses is the effect, ``[cells]``.

        A main effect is the mean loss at the second level minus that at the first. An interaction is how
        much more the first factor changes the loss where the second is at its second level.
        """
        return signs(cells, self.factors) * 2 * self.scale / len(cells)


@dataclass(frozen=True)
class Factorial:
    """A factorial design.

    Attributes:
        factors: in the order of the file.
        fraction: one in how many of the crossed cells is trained.
        cells: the levels of every cell, in the order of the arms; the first is the baseline.
    """

    factors: tuple[Factor, ...]
    fraction: int
    cells: tuple[Levels, ...]

    @staticmethod
    def of(record: FactorialRecord) -> Factorial:
        """The design of a record."""
        factors = tuple(
            Factor(f.name, (f.levels[0], f.levels[1]), tuple(f.fields)) for f in record.factors
        )
        return Factorial(factors, record.fraction, tuple(tuple(cell) for cell in record.cells))

    @cached_property
    def effects(self) -> tuple[Effect, ...]:
        """The effects that are estimated: every factor's, and every interaction of two that does not share
        its estimate with one before it."""
        found: list[Effect] = []
        count = len(self.factors)
        for size in (1, 2):
            for factors in combinations(range(count), size):
                same = [e for e in found if are_aliases(self.cells, e.factors, factors)]
                if not same:
                    found.append(Effect(factors))
                    continue
                index = found.index(same[0])
                found[index] = Effect(same[0].factors, (*same[0].aliases, factors))
        return tuple(found)

    def effect_name(self, factors: Iterable[int]) -> str:
        """``qk_norm``, or ``qk_norm x rate``."""
        return " x ".join(self.factors[i].name for i in factors)

    def cell_name(self, levels: Levels) -> str:
        """``qk_norm=on, rate=low``: the name of an arm."""
        return ", ".join(
            f"{factor.name}={factor.levels[level]}"
            for factor, level in zip(self.factors, levels, strict=True)
        )

    def changed_fields(self, a: Levels, b: Levels) -> frozenset[str]:
        """Config fields in which two cells may differ: those of the factors at other levels."""
        changed = (f for f, one, other in zip(self.factors, a, b, strict=True) if one != other)
        return frozenset(name for factor in changed for name in factor.fields)

    @property
    def text(self) -> str:
        """The factors with their levels, and the share of the cells that is trained."""
        factors = " x ".join(f"{f.name} ({f.levels[0]}, {f.levels[1]})" for f in self.factors)
        return f"{factors}; {self.size_text}"

    @property
    def size_text(self) -> str:
        """``8 of 16 cells, a half fraction of resolution IV``."""
        every = 2 ** len(self.factors)
        if self.fraction == 1:
            return f"all {every} cells"
        words = defining_words(generators(len(self.factors), self.fraction))
        resolution = ROMAN[min(map(len, words))]
        name = FRACTIONS.get(self.fraction, f"one in {self.fraction}")
        return f"{len(self.cells)} of {every} cells, {name} of resolution {resolution}"


def signs(cells: Sequence[Levels], factors: Iterable[int]) -> np.ndarray:
    """The product over ``factors`` of -1 at the first level and +1 at the second, ``[cells]``."""
    levels = 2.0 * np.asarray(cells, float) - 1
    found: np.ndarray = levels[:, list(factors)].prod(axis=1)
    return found


def are_aliases(cells: Sequence[Levels], a: Iterable[int], b: Iterable[int]) -> bool:
    """Whether the effects of two groups of factors have one estimate, up to its sign."""
    return abs(float(signs(cells, a) @ signs(cells, b))) == len(cells)


def fields_between(
    design: Factorial | None, factor: str, arms: Sequence[str], pair: tuple[str, str], matched: bool
) -> frozenset[str]:
    """The config fields in which two arms may differ.

    Args:
        design: of a factorial experiment.
        factor: of another experiment.
        arms: of the experiment, in order.
        pair: two of them.
        matched: whether arms may have other lengths, for equal compute.

    Raises:
        UserError: there is no such factor or field.
    """
    if design is None:
        return allowed_fields(factor, matched)
    a, b = (design.cells[arms.index(arm)] for arm in pair)
    fields = design.changed_fields(a, b)
    return fields | LENGTH_FIELDS if matched else fields


def design_faults(record: ExperimentRecord) -> Iterator[str]:
    """Contradictions between a record and its factorial design; none without one."""
    if record.factorial is None:
        return
    count, cells = len(record.factorial.factors), Factorial.of(record.factorial).cells
    known = {(cell.condition, cell.arm) for cell in record.cells}
    if len(cells) != len(record.arms) or len(set(cells)) < len(cells):
        yield "its factorial design has other cells than its arms"
    elif any(len(cell) != count for cell in cells) or any(cells[0]):
        yield "a cell of its factorial design has no level of every factor"
    elif record.baseline != record.arms[0]:
        yield "its baseline is not the cell of all first levels"
    elif known != set(product(record.conditions, record.arms)):
        yield "a cell of its factorial design is missing"
    elif any(2 * sum(levels) != len(cells) for levels in zip(*cells, strict=True)):
        yield "a factor of its factorial design does not have each level in half of the cells"


def design_cells(count: int, fraction: int) -> tuple[Levels, ...]:
    """The cells of ``count`` factors, the base of all first.

    Raises:
        UserError: there is no such fraction, or main effects would share an estimate in it.
    """
    if not FEWEST_FACTORS <= count <= MOST_FACTORS:
        raise UserError(
            f"[factors] has {count}: a factorial experiment has {FEWEST_FACTORS} to {MOST_FACTORS}"
        )
    if fraction < 1 or fraction & (fraction - 1):
        raise UserError(f"fraction is {fraction}: it must be 1, 2, 4 or another power of 2")
    words = generators(count, fraction)
    basic = count - len(words)
    cells = []
    for levels in product((0, 1), repeat=basic):
        added = [sum(levels[i] for i in word if i < basic) % 2 for word in words]
        cells.append((*levels, *added))
    if len(cells) > MOST_CELLS:
        raise UserError(
            f"{count} factors have {len(cells)} cells, more than {MOST_CELLS}: choose a larger fraction"
        )
    return tuple(cells)


def generators(count: int, fraction: int) -> tuple[Word, ...]:
    """The words that define the best fraction: of the highest resolution, and with the fewest words of
    each length from the shortest on.

    Raises:
        UserError: main effects would share an estimate.
    """
    added = fraction.bit_length() - 1
    basic = count - added
    choices = [
        frozenset(word) for size in range(2, basic + 1) for word in combinations(range(basic), size)
    ]
    if len(choices) < added:
        possible = [f for f in FRACTIONS if _has_room(count, f)]
        raise UserError(
            f"fraction is {fraction}: with {count} factors main effects would share an estimate; "
            f"use {' or '.join(map(str, possible))}"
        )
    designs = (
        tuple(word | {basic + i} for i, word in enumerate(chosen))
        for chosen in combinations(choices, added)
    )
    return min(designs, key=lambda words: _word_lengths(words, count))


def _has_room(count: int, fraction: int) -> bool:
    basic = count - (fraction.bit_length() - 1)
    return basic > 0 and 2**basic - basic - 1 >= count - basic


def defining_words(words: Sequence[Word]) -> Iterator[Word]:
    """All words of a fraction: the sums of its generators."""
    for size in range(1, len(words) + 1):
        for chosen in combinations(words, size):
            total: Word = frozenset()
            for word in chosen:
                total ^= word
            yield total


def _word_lengths(words: Sequence[Word], count: int) -> tuple[int, ...]:
    """Numbers of defining words of three factors, of four, and so on."""
    lengths = [len(word) for word in defining_words(words)]
    return tuple(lengths.count(n) for n in range(3, count + 1))
