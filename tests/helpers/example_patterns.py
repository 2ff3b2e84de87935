"""An example of every attention pattern, for tests."""

from __future__ import annotations

from storylab.config import FULL, AttentionPattern, Window
from storylab.config.patterns import PATTERNS

EXAMPLES = [kind.example for kind in PATTERNS]


def pattern_of(window: int | None) -> AttentionPattern:
    return FULL if window is None else Window(window)
