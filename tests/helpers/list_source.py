"""Data sets made from a list of stories, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storylab.data.dataset import (
    Dataset,
    load_dataset,
)
from storylab.data.prepare import write_dataset
from storylab.data.reading import clean, read_texts
from storylab.data.tally import Tally
from storylab.data.tokenizer import Tokenizer

STORIES = ["Tom ran.", "Él comió “pan”.\n\nThe end.", "A cat sat on 1,234 mats!", "Tom ran."]


@dataclass(frozen=True)
class ListSource:
    """Stories from a list, for tests."""

    splits: dict[str, list[str]]

    @property
    def has_test(self) -> bool:
        return "test" in self.splits

    def describe(self) -> dict[str, Any]:
        return {"name": "list"}

    def texts(self, split: str, tally: Tally) -> Iterator[str]:
        return iter(self.splits[split])

    def size_bytes(self, split: str) -> int | None:
        return None


def stories_in(path: Path) -> list[str]:
    return list(clean(read_texts(path, Tally()), Tally()))


def write(folder: Path, train: list[str], tokenizer: Tokenizer, keep: bool = False) -> Dataset:
    source = ListSource({"train": train, "validation": ["Only here. " * 9]})
    write_dataset(folder, source, tokenizer, {}, keep, lambda *progress: None)
    return load_dataset(folder)
