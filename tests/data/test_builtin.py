"""The built-in corpus."""

from __future__ import annotations

from storylab.data import builtin


def test_builtin_corpus_is_deterministic_and_varied() -> None:
    stories = list(builtin.stories(0, 0, 5000))
    assert stories[123] == builtin.story(0, 123)
    assert len(set(stories)) > 4990
    assert not any("{" in story or "  " in story for story in stories)
    assert builtin.story(0, 1) != builtin.story(1, 1)
