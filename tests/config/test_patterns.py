"""Attention patterns in a config: written, dealt out to layers, refused."""

from __future__ import annotations

import pytest

from example_patterns import EXAMPLES, pattern_of
from storylab.config import AttentionPattern, ModelConfig, parse_attention
from storylab.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        ("full", (None,)),
        ("window:64", (64,)),
        ("window:64*3,full", (64, 64, 64, None)),
        ("window:8, full*2", (8, None, None)),
    ],
)
def test_patterns_are_dealt_out_to_the_layers(pattern: str, windows: tuple[int | None]) -> None:
    patterns = tuple(map(pattern_of, windows))
    assert parse_attention(pattern) == patterns
    config = ModelConfig(attention=pattern)
    assert config.layer_patterns == tuple(patterns[i % len(patterns)] for i in range(12))


@pytest.mark.parametrize("text", [*EXAMPLES, "window:1", "window:40"])
@pytest.mark.parametrize("length", [1, 6, 7, 8, 40])
def test_a_patterns_facts_are_those_of_its_mask(text: str, length: int) -> None:
    """Counted position by position, in Python's integers."""
    (pattern,) = parse_attention(text)
    read = [[k for k in range(length) if pattern.allows(q, k)] for q in range(length)]
    assert all(k <= q for q, keys in enumerate(read) for k in keys)
    assert pattern.pairs(length) == sum(map(len, read)) == AttentionPattern.pairs(pattern, length)
    assert pattern.most_read(length) == max(map(len, read))
    assert pattern.most_read(length) == AttentionPattern.most_read(pattern, length)
    # A pattern may leave it open that it covers a length, but not claim it wrongly.
    assert not pattern.covers(length) or all(len(keys) == q + 1 for q, keys in enumerate(read))
    if pattern.reach is not None:
        assert all(q - k < pattern.reach for q, keys in enumerate(read) for k in keys)


@pytest.mark.parametrize("pattern", ["", "window", "window:0", "window:-3", "flash", "full,,full"])
def test_what_is_no_pattern_is_refused_with_an_example(pattern: str) -> None:
    with pytest.raises(UserError, match=r"window:64\*3,full"):
        ModelConfig(attention=pattern)
