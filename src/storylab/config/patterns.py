"""Attention patterns: the earlier positions that a query reads. A pattern is one class here.

A pattern owns all its facts: its mask, how far it reaches, how many pairs of positions it computes, its
spelling in ``--attention`` and its name in tables. Kernels (:mod:`storylab.model.attention`), caches, plans
and reports ask it. One that no fast kernel knows runs on a general path, with its mask as a tensor.
This module does not load torch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from storylab.errors import UserError


class AttentionPattern(ABC):
    """The positions that the queries of one layer read. Instances are equal if they read the same.

    Attributes:
        usage: its spelling, as messages explain it.
        example: a pattern of this kind that leaves something out in short sequences, for tests.
    """

    usage: ClassVar[str]
    example: ClassVar[str]

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self | None:
        """The pattern that ``text`` spells; None if it spells no pattern of this class."""

    @abstractmethod
    def allows(self, query: Any, key: Any) -> Any:
        """The mask: whether the query at one position may read the key at another.

        Args:
            query: positions, counted from 0: an int, or an integer array or tensor.
            key: the same, of a shape that broadcasts with ``query``.

        Returns:
            True or False for each pair. Never true for ``key > query``. If the pattern has a ``reach``,
            it may depend on the distance ``query - key`` alone.
        """

    @property
    @abstractmethod
    def label(self) -> str:
        """Its name in log lines."""

    @property
    @abstractmethod
    def short(self) -> str:
        """Its name in lists of all layers."""

    @property
    def reach(self) -> int | None:
        """Number of last positions, the query's own included, beyond which it reads nothing; None if it
        may read the first position from any other. A cache for generation keeps one less."""
        return None

    def covers(self, length: int) -> bool:
        """Whether every query of a sequence of ``length`` positions reads all positions before it. False is
        always right, and only slower."""
        return length <= 1

    def pairs(self, length: int) -> int:
        """Number of pairs of a query and a key that it reads, in a sequence of ``length`` positions."""
        import numpy as np

        positions = np.arange(length)
        return int(np.count_nonzero(self.allows(positions[:, None], positions[None, :])))

    def most_read(self, length: int) -> int:
        """Greatest number of positions that a query reads in a sequence of ``length``."""
        import numpy as np

        positions = np.arange(length)
        allowed = self.allows(positions[:, None], positions[None, :])
        return int(np.count_nonzero(allowed, axis=1).max())


@dataclass(frozen=True)
class Full(AttentionPattern):
    """Every position up to the query's own."""

    usage = example = "full"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        return cls() if text == "full" else None

    def allows(self, query: Any, key: Any) -> Any:
        return key <= query

    @property
    def label(self) -> str:
        return "full attention"

    @property
    def short(self) -> str:
        return "full"

    def covers(self, length: int) -> bool:
        return True

    def pairs(self, length: int) -> int:
        return length * (length + 1) // 2

    def most_read(self, length: int) -> int:
        return length


@dataclass(frozen=True)
class Window(AttentionPattern):
    """A sliding window: the query's own position and the ``size - 1`` before it (Beltagy et al. 2020, arXiv
    2004.05150; Mistral 7B, arXiv 2310.06825)."""

    size: int

    usage, example = "window:N", "window:7"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        found = re.fullmatch(r"window:([1-9]\d{0,8})", text)
        return cls(int(found[1])) if found else None

    def allows(self, query: Any, key: Any) -> Any:
        return (key <= query) & (query - key < self.size)

    @property
    def label(self) -> str:
        return f"window of {self.size}"

    @property
    def short(self) -> str:
        return str(self.size)

    @property
    def reach(self) -> int:
        return self.size

    def covers(self, length: int) -> bool:
        return self.size >= length

    def pairs(self, length: int) -> int:
        size = min(self.size, length)
        # Queries before the window is full read 1, 2, ... positions.
        return size * (size + 1) // 2 + (length - size) * size

    def most_read(self, length: int) -> int:
        return min(self.size, length)


FULL = Full()
PATTERNS: tuple[type[AttentionPattern], ...] = (Full, Window)


def parse_attention(text: str) -> tuple[AttentionPattern, ...]:
    """The patterns of a list that is dealt out to the layers in turn, e.g. ``window:64*2,full`` for two
    windows and a full layer.

    Raises:
        UserError: a part of it is not a pattern.
    """
    patterns: list[AttentionPattern] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\S*?)(?:\*([1-9]\d{0,2}))?\s*", part)
        parsers: list[Callable[[str], AttentionPattern | None]] = [kind.parse for kind in PATTERNS]
        pattern = (
            next(filter(None, (parse(found[1]) for parse in parsers)), None) if found else None
        )
        if found is None or pattern is None:
            usages = " or ".join(kind.usage for kind in PATTERNS)
            raise UserError(
                f"attention pattern '{text}' has '{part}': write {usages}, or a list "
                "for the layers in turn such as window:64*3,full"
            )
        patterns += [pattern] * int(found[2] or 1)
    return tuple(patterns)
