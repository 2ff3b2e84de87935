"""The longest copied spans against a search in all places; distinct n-grams against a count by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storylab.data.dataset import Dataset, Split
from storylab.data.layout import TRAIN
from storylab.quality.copying import Span, longest_copies
from storylab.quality.samples import distinct_n, held_out_sample, measure

VOCAB = 4
END = VOCAB - 1


def split_of(shards: list[list[int]]) -> Split:
    """A split of a few shards; the search does not read the borders of its stories."""
    starts = np.cumsum([0, *map(len, shards)]).tolist()
    arrays = tuple(np.array(shard, dtype=np.uint16) for shard in shards)
    return Split(TRAIN, arrays, tuple(starts), np.zeros((1, 2), dtype=np.int64))


def brute_force(story: list[int], tokens: list[int]) -> int:
    """The length of the longest span of ``story`` in ``tokens``, every pair of places compared."""
    best = 0
    for i in range(len(story)):
        for j in range(len(tokens)):
            n = 0
            while i + n < len(story) and j + n < len(tokens) and story[i + n] == tokens[j + n]:
                n += 1
            best = max(best, n)
    return best


IDS = st.lists(st.integers(0, END - 1), max_size=40)


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(0, END), min_size=1, max_size=60), min_size=1, max_size=3),
    stories=st.lists(IDS, min_size=1, max_size=4),
    copied=st.tuples(st.integers(0, 150), st.integers(0, 40)),
    block=st.integers(1, 70),
)
def test_spans_are_those_of_a_search_in_all_places(
    shards: list[list[int]], stories: list[list[int]], copied: tuple[int, int], block: int
) -> None:
    """Across borders of shards and blocks; one story has a long copy between its own tokens."""
    tokens = [token for shard in shards for token in shard]
    first, length = copied
    stories.append([0, *(t for t in tokens[first : first + length] if t != END), 1])
    split = split_of(shards)
    arrays = [np.array(story, dtype=np.int64) for story in stories]
    found = longest_copies(arrays, split, VOCAB, block=block)
    for story, span in zip(stories, found, strict=True):
        assert span.length == brute_force(story, tokens)
        here = story[span.start : span.start + span.length]
        assert here == tokens[span.place : span.place + span.length]


def test_a_span_ends_with_its_story() -> None:
    """An end of text is in no written story, so no span reaches across two training stories."""
    split = split_of([[0, 1, 2, END, 2, 1, 0, END]])
    (span,) = longest_copies([np.array([0, 1, 2, 2, 1, 0])], split, VOCAB)
    assert span == Span(0, 3, 0)


def test_two_ngrams_of_one_hash_are_not_taken_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "storylab.quality.copying._Hashes.of",
        lambda self, starts, length: np.zeros(len(starts), dtype=np.uint64),
    )
    split = split_of([[0] * 30])
    (span,) = longest_copies([np.array([1] * 20)], split, VOCAB)
    assert span.length == 0


@settings(deadline=None)
@given(stories=st.lists(IDS, max_size=5), n=st.integers(1, 3))
def test_distinct_ngrams_are_counted(stories: list[list[int]], n: int) -> None:
    texts = ["".join("abc"[token] for token in story) for story in stories]
    all_grams = [text[i : i + n] for text in texts for i in range(len(text)) if len(text) >= i + n]
    found = distinct_n([np.array(story, dtype=np.int64) for story in stories], n)
    if all_grams:
        assert found == len(set(all_grams)) / len(all_grams)
    else:
        assert math.isnan(found)


def test_a_copied_story_is_found_whole(dataset: Dataset) -> None:
    """A training story between two of its tokens out of order; validation stories copy less."""
    split = dataset.splits[TRAIN]
    begin, end = split.stories[7, 0], split.stories[8, 0] - 1
    story = split.read(begin, end)
    mixed = np.concatenate((story[::-1], story))
    held_out = held_out_sample(dataset, 4, 50)
    found, others = measure([[mixed, np.array([], dtype=np.int64)], held_out], dataset)
    assert found.longest_copied_tokens >= len(story) and found.copied_tokens >= len(story) / 2
    assert dataset.tokenizer.decode(story.tolist()) in found.longest_copied_text
    assert (found.stories, found.tokens) == (2, 2 * len(story))
    assert [len(ids) for ids in held_out] == [50] * 4
    assert (others.stories, others.tokens) == (4, 200) and others.longest_copied_tokens < 50
    assert measure([held_out], dataset) == [others]
    assert len(held_out_sample(dataset, 10**6, 50)) == len(dataset.splits["validation"].stories) - 1
