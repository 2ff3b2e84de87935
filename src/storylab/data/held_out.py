"""The stories of each split, and the test split that is cut from the validation stories.

A source without test stories of its own has half of its validation stories for test. The hash of a
story's text decides, so a story goes to the same split in every order and in every source, and its
duplicates go with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from storylab.data.layout import TEST, TRAIN, VALIDATION
from storylab.data.reading import clean
from storylab.data.sources import Source
from storylab.data.tally import Tally

# One story has no standard error.
LEAST_STORIES = 2
TestOrigin = Literal["hash", "files", "none"]


def is_test_story(story: str) -> bool:
    """Whether the hash of a validation story sends it to the test split: the last bit of the SHA-256
    of its UTF-8 text, as it is stored, is 1."""
    return bool(hashlib.sha256(story.encode()).digest()[-1] & 1)


def can_be_cut(stories: Iterator[str]) -> bool:
    """Whether test and validation both get at least two different stories if the hash decides.

    Reads no further than needed.
    """
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    for story in stories:
        side = sides[is_test_story(story)]
        if len(side) < LEAST_STORIES:
            side.add(story)
        if all(len(found) == LEAST_STORIES for found in sides.values()):
            return True
    return False


@dataclass(frozen=True)
class SplitStories:
    """Cleaned stories of a source by split.

    ``test`` is the origin of the test split: ``files`` of its own, cut by ``hash`` from the
    validation stories, or ``none``, where these are too few to cut.
    """

    source: Source
    test: TestOrigin

    @staticmethod
    def of(source: Source) -> SplitStories:
        """Find out where the test split of a source comes from."""
        if source.has_test:
            return SplitStories(source, "files")
        cut = can_be_cut(SplitStories(source, "none")(VALIDATION, Tally()))
        return SplitStories(source, "hash" if cut else "none")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, each after those that it must not share stories with."""
        return (VALIDATION, TRAIN) if self.test == "none" else (TEST, VALIDATION, TRAIN)

    def __call__(self, split: str, tally: Tally) -> Iterator[str]:
        """The stories of a split, in the order of the source."""
        if self.test != "hash" or split == TRAIN:
            yield from clean(self.source.texts(split, tally), tally)
            return
        for story in clean(self.source.texts(VALIDATION, tally), tally):
            if is_test_story(story) == (split == TEST):
                yield story

    def has_own_files(self, split: str) -> bool:
        """Whether the split is not cut from another, so that reading it is counted apart."""
        return split != TEST or self.test == "files"

    def size_bytes(self, split: str) -> int | None:
        """About how many bytes of text the split has; None if unknown."""
        if self.test != "hash" or split == TRAIN:
            return self.source.size_bytes(split)
        total = self.source.size_bytes(VALIDATION)
        return None if total is None else total // 2
