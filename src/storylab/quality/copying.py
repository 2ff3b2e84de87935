"""The longest span of each story that a split has too, token by token, in a pass or two over its shards.

The stories are few and the split is long. So the n-grams of the stories are kept in tables, and the split
is read in blocks. A place of the split where 8 tokens are those of a story is followed for as long as its
longer n-grams are in the tables. Tables hold hashes; a span that they find is compared token by token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storylab.data.dataset import Split
from storylab.training.evaluation import Tick

# Shortest span of the first pass. Shorter ones are at most places of a split, so only a second pass looks
# for them, for stories without a longer one.
SHORTEST = 8
# Tokens of a split in memory at once, as a few arrays of 64-bit numbers.
BLOCK = 1 << 20
# A table of hashes begins with this many bits of each, which rule out most others.
FILTER_BITS = 20
# Odd, so that it has an inverse modulo 2^64.
BASE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Span:
    """A span of a story that a split has too.

    Attributes:
        start: index of its first token in the story.
        length: number of its tokens; 0 where no token of the story is in the split.
        place: token of the split where the span begins there.
    """

    start: int = 0
    length: int = 0
    place: int = 0


def longest_copies(
    stories: Sequence[np.ndarray],
    split: Split,
    vocab_size: int,
    tick: Tick = lambda done, total: None,
    block: int = BLOCK,
) -> list[Span]:
    """The longest span of each story that ``split`` has.

    Args:
        stories: ids without an end of text, ``[n]`` each, so that no span reaches across stories.
        split: the tokens to search.
        vocab_size: number of ids.
        tick: called before every block with the tokens done and all of them.
        block: tokens of the split in memory at once.
    """
    spans = _search(stories, split, vocab_size, SHORTEST, tick, block)
    missing = [i for i, span in enumerate(spans) if not span.length and len(stories[i])]
    if missing:
        shorter = [stories[i] for i in missing]
        found = _search(shorter, split, vocab_size, 1, tick, block)
        for i, span in zip(missing, found, strict=True):
            spans[i] = span
    return spans


class _Hashes:
    """Hashes of the n-grams of an array of ids.

    The hash of tokens t(i) to t(i + n - 1) is the sum of r(t(i + k)) * BASE^k modulo 2^64, where r is a
    random number for each id (Karp & Rabin 1987). It is taken from sums over the whole array, so it costs
    the same for any n.
    """

    def __init__(self, ids: np.ndarray, numbers: np.ndarray, powers: _Powers) -> None:
        sums = np.cumsum(numbers[ids] * powers.up[: len(ids)], dtype=np.uint64)
        self._sums = np.concatenate((np.zeros(1, np.uint64), sums))
        self._down = powers.down

    def of(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Hashes of the n-grams of ``length`` that begin at ``starts [n]``, ``[n]`` uint64."""
        return (self._sums[starts + length] - self._sums[starts]) * self._down[starts]


class _Powers:
    """BASE^i modulo 2^64 and their inverses, for i below ``count``."""

    def __init__(self, count: int) -> None:
        self.up, self.down = _powers(BASE, count), _powers(pow(BASE, -1, 1 << 64), count)


def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


class _Table:
    """The n-grams of one length of all stories, each with a place of the split that has it, or -1."""

    def __init__(self, hashes: _Hashes, room: np.ndarray, length: int) -> None:
        self.length = length
        self._starts = np.flatnonzero(room >= length)
        self._hashes, self._number = np.unique(hashes.of(self._starts, length), return_inverse=True)
        self._filter = np.zeros(1 << FILTER_BITS, dtype=bool)
        self._filter[self._hashes >> np.uint64(64 - FILTER_BITS)] = True
        self._places = np.full(len(self._hashes), -1, dtype=np.int64)

    def enter(self, hashes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Note the places whose hashes are in the table; their indices."""
        likely = np.flatnonzero(self._filter[hashes >> np.uint64(64 - FILTER_BITS)])
        number = np.searchsorted(self._hashes, hashes[likely])
        number = np.minimum(number, len(self._hashes) - 1)
        there = self._hashes[number] == hashes[likely]
        self._places[number[there]] = places[likely[there]]
        return likely[there]

    def found(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the n-grams that the split has start, from ``begin`` to before ``end``, and a place of each
        in the split."""
        rows = slice(*np.searchsorted(self._starts, (begin, end)))
        starts, places = self._starts[rows], self._places[self._number[rows]]
        return starts[places >= 0], places[places >= 0]


def _search(
    stories: Sequence[np.ndarray],
    split: Split,
    vocab_size: int,
    shortest: int,
    tick: Tick,
    block: int,
) -> list[Span]:
    """The longest span of at least ``shortest`` tokens of each story; of length 0 where there is none."""
    longest = max(map(len, stories), default=0)
    if longest < shortest:
        return [Span()] * len(stories)
    numbers = np.random.default_rng(0).integers(0, 1 << 64, size=vocab_size, dtype=np.uint64)
    joined = np.concatenate(stories).astype(np.int64)
    powers = _Powers(max(len(joined), block + longest))
    room = np.concatenate([np.arange(len(story), 0, -1) for story in stories])
    of_stories = _Hashes(joined, numbers, powers)
    tables: list[_Table] = []
    for first in range(0, len(split), block):
        tick(first, len(split))
        ids = split.read(first, min(first + block + longest - 1, len(split)))
        hashes = _Hashes(ids, numbers, powers)
        starts = np.arange(min(block, len(ids)))
        for length in range(shortest, longest + 1):
            starts = starts[starts + length <= len(ids)]
            if not len(starts):
                break
            if length - shortest == len(tables):
                tables.append(_Table(of_stories, room, length))
            table = tables[length - shortest]
            starts = starts[table.enter(hashes.of(starts, length), first + starts)]
    borders = np.cumsum([0, *map(len, stories)])
    return [_longest(tables, joined, split, *ends) for ends in itertools.pairwise(borders)]


def _longest(tables: list[_Table], joined: np.ndarray, split: Split, begin: int, end: int) -> Span:
    """The longest span of the story ``joined[begin:end]`` that the tables have found."""
    for table in reversed(tables):
        for start, place in zip(*table.found(begin, end), strict=True):
            # Two n-grams may share a hash, by a chance of about one in a million searches.
            ids = split.read(place, place + table.length)
            if np.array_equal(ids, joined[start : start + table.length]):
                return Span(int(start - begin), table.length, int(place))
    return Span()
