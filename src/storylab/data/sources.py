"""Where stories come from: the Hugging Face hub, local files, the built-in corpus.

A source yields the raw texts of one split in a fixed order.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from storylab.checksums import sha256_file
from storylab.data import builtin
from storylab.data.hub import download
from storylab.data.layout import END_OF_TEXT, TEST, TRAIN, VALIDATION
from storylab.data.reading import kind_of, read_texts, text_bytes
from storylab.data.tally import Tally, plural
from storylab.errors import UserError
from storylab.files import reading, shown


class Source(Protocol):
    """Texts by split, and the values that identify them."""

    @property
    def has_test(self) -> bool:
        """Whether it has test stories apart from its validation stories."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON values that identify the content, for the manifest."""
        ...

    def texts(self, split: str, tally: Tally) -> Iterator[str | None]:
        """Raw texts of ``split`` in order, None for a null row, for :func:`storylab.data.reading.clean`."""
        ...

    def size_bytes(self, split: str) -> int | None:
        """About how many bytes of text the split has, for progress; None if unknown."""
        ...


@dataclass(frozen=True)
class BuiltinSource:
    """Stories from the grammar in ``builtin.py``; one in twenty is for validation."""

    stories: int
    seed: int
    has_test: bool = False

    def describe(self) -> dict[str, Any]:
        grammar = sha256_file(Path(builtin.__file__))
        return {
            "name": "builtin",
            "stories": self.stories,
            "seed": self.seed,
            "grammar_sha256": grammar,
        }

    def texts(self, split: str, tally: Tally) -> Iterator[str]:
        held_out = max(1, self.stories // 20)
        if split == VALIDATION:
            return builtin.stories(self.seed, 0, held_out)
        return builtin.stories(self.seed, held_out, self.stories - held_out)

    def size_bytes(self, split: str) -> int | None:
        return None


@dataclass(frozen=True)
class RowRange:
    """Rows ``first`` (included) to ``last`` (excluded; None: the end) of a split's files."""

    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class FileSource:
    """Stories in files; ``rows`` names the part of the files that belongs to a split, and
    ``skipped`` the entries that were not read in the given folders."""

    name: str
    files: dict[str, tuple[Path, ...]]
    rows: dict[str, RowRange]
    origin: dict[str, str]
    skipped: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def has_test(self) -> bool:
        return TEST in self.files

    def describe(self) -> dict[str, Any]:
        hashes = {
            split: [{"file": path.name, "sha256": sha256_file(path)} for path in paths]
            for split, paths in self.files.items()
        }
        return {"name": self.name, **self.origin, "files": hashes}

    def texts(self, split: str, tally: Tally) -> Iterator[str | None]:
        tally.skip(self.skipped.get(split, ()))
        part = self.rows.get(split, RowRange())
        texts = (text for path in self.files[split] for text in read_texts(path, tally))
        for row, text in enumerate(texts):
            if part.last is not None and row >= part.last:
                return
            if row >= part.first:
                yield text

    def size_bytes(self, split: str) -> int | None:
        return sum(text_bytes(path) for path in self.files[split])


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub: its repository, the pinned revision, and the files of each split."""

    repo: str
    revision: str
    files: dict[str, tuple[str, ...]]
    rows: dict[str, RowRange]


_TINYSTORIES_REVISION = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
_CLEAN_FILE = ("tinystories_gpt4_clean.parquet",)
HUB_DATASETS: dict[str, HubDataset] = {
    "tinystories": HubDataset(
        "roneneldan/TinyStories",
        _TINYSTORIES_REVISION,
        {
            TRAIN: (
                "data/train-00000-of-00004-2d5a1467fff1081b.parquet",
                "data/train-00001-of-00004-5852b56a2bd28fd9.parquet",
                "data/train-00002-of-00004-a26307300439e943.parquet",
                "data/train-00003-of-00004-d243063613e5a057.parquet",
            ),
            VALIDATION: ("data/validation-00000-of-00001-869c898b519ad725.parquet",),
        },
        {},
    ),
    "tinystories-v2": HubDataset(
        "roneneldan/TinyStories",
        _TINYSTORIES_REVISION,
        {
            TRAIN: ("TinyStoriesV2-GPT4-train.txt",),
            VALIDATION: ("TinyStoriesV2-GPT4-valid.txt",),
        },
        {},
    ),
    # The data set's card: shuffled rows, the first 10,000 for test, the next 10,000 for validation.
    "tinystories-gpt4-clean": HubDataset(
        "karpathy/tinystories-gpt4-clean",
        "main",
        {TRAIN: _CLEAN_FILE, VALIDATION: _CLEAN_FILE},
        {TRAIN: RowRange(20_000), VALIDATION: RowRange(10_000, 20_000)},
    ),
}


def hub_source(name: str) -> FileSource:
    """Download the named hub data set (continuing partial downloads) and read it from disk.

    Raises:
        UserError: the hub cannot be reached or does not have the files.
    """
    dataset = HUB_DATASETS[name]
    paths = {
        split: tuple(
            download(dataset.repo, file, dataset.revision, repo_type="dataset") for file in files
        )
        for split, files in dataset.files.items()
    }
    # The hub's cache puts a file under snapshots/COMMIT/, whatever name the revision was asked by.
    parts = paths[TRAIN][0].parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else dataset.revision
    return FileSource(name, paths, dataset.rows, {"repo": dataset.repo, "revision": commit})


def local_source(
    train: tuple[Path, ...], validation: tuple[Path, ...], test: tuple[Path, ...] = ()
) -> FileSource:
    """Local files; a folder means the readable files in and below it, in order of their names.

    Raises:
        UserError: a path does not exist or holds no file of a known kind.
    """
    given = {TRAIN: train, VALIDATION: validation, TEST: test}
    found = {split: _expand(paths) for split, paths in given.items() if paths}
    files = {split: paths for split, (paths, _) in found.items()}
    skipped = {split: names for split, (_, names) in found.items()}
    return FileSource("files", files, {}, {}, skipped)


def _expand(paths: tuple[Path, ...]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Files to read, and the names of other entries of folders."""
    files: list[Path] = []
    skipped: list[str] = []
    for path in paths:
        with reading(path):
            mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            inside, others = _walk(path)
            if not inside:
                left = f" (passed over {plural(len(others), 'entry')})" if others else ""
                raise UserError(f"{shown(path)} has no .txt, .parquet or .jsonl file{left}")
            files += inside
            skipped += others
        elif not kind_of(path):
            raise UserError(
                f"{shown(path)} is of no known kind: use .txt with {END_OF_TEXT} between stories, "
                ".parquet with a text column, or .jsonl (also .gz or .zst)"
            )
        else:
            files.append(path)
    return tuple(files), tuple(skipped)


def _walk(root: Path) -> tuple[list[Path], list[str]]:
    """Readable files in and below a folder, in order of their paths, and the entries that are
    skipped: hidden files and folders, files of other kinds, and links to a folder that holds this
    one or has been read."""
    files: list[Path] = []
    skipped: list[str] = []
    with reading(root):
        seen = {_identity(folder) for folder in root.resolve().parents}
    ahead = [root]
    while ahead:
        path = ahead.pop()
        hidden = path != root and path.name.startswith(".")
        with reading(path):
            if not hidden and path.is_dir() and _identity(path) not in seen:
                seen.add(_identity(path))
                ahead += sorted(path.iterdir(), reverse=True)
            elif not hidden and not path.is_dir() and kind_of(path):
                files.append(path)
            else:
                skipped.append(str(path.relative_to(root)))
    return files, skipped


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
