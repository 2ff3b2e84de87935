"""Data sets: their bytes against their checksums and manifests, and their shards against each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from storylab.checksums import CHECKSUMS, read_checksums, sha256_file
from storylab.data.dataset import MANIFEST, TOKENIZER_FILE, Dataset, Split, load_dataset
from storylab.data.layout import SPLITS, TEST
from storylab.data.manifest import Manifest, SplitInfo
from storylab.errors import UserError
from storylab.files import exists, read_record
from storylab.verify.findings import Difference, Finding, Gap, fault_difference, unequal


class DataSets:
    """Data sets, each read once however many runs used it."""

    def __init__(self) -> None:
        self.manifest = cache(_manifest)
        self.load = cache(_load)


def _manifest(folder: Path) -> Manifest | UserError:
    try:
        check = read_checksums(folder).require
        return read_record(folder / MANIFEST, Manifest, lambda data: check(MANIFEST, data))
    except UserError as error:
        return error


def _load(folder: Path) -> Dataset | UserError:
    """The data set in a folder; the bytes of its shards are checked on the way."""
    try:
        return load_dataset(folder)
    except UserError as error:
        return error


def files_in(manifest: Manifest) -> dict[str, str]:
    """The files of the splits, and their hex SHA-256."""
    infos = [getattr(manifest.splits, name) for name in SPLITS]
    splits = [info for info in infos if isinstance(info, SplitInfo)]
    shards = {shard.file: shard.sha256 for split in splits for shard in split.shards}
    return shards | {split.stories_file: split.stories_sha256 for split in splits}


@dataclass(frozen=True)
class DataSubject:
    """A data set to verify."""

    folder: Path
    data: DataSets


def changed_bytes(subject: DataSubject) -> Iterator[Finding]:
    """Files whose bytes are not those that were written, or that are missing."""
    folder = subject.folder
    sums = dict(read_checksums(folder).sums)
    if not sums:
        yield Gap(
            f"there is no {CHECKSUMS}, as in data sets of earlier versions: a changed byte of {MANIFEST} "
            "is noticed only if it is part of the fingerprint"
        )
        manifest = subject.data.manifest(folder)
        if isinstance(manifest, UserError):
            yield fault_difference(manifest, (MANIFEST,))
            return
        sums = files_in(manifest)
    for name, expected in sums.items():
        if not exists(folder / name):
            yield Difference(name, f"{folder / name} is missing")
        elif sha256_file(folder / name) != expected:
            yield Difference(name, f"{folder / name} has been altered: its SHA-256 differs")


def manifest_faults(subject: DataSubject) -> Iterator[Finding]:
    """A manifest that does not describe the tokenizer, the shards and the tables of stories."""
    dataset = subject.data.load(subject.folder)
    if isinstance(dataset, UserError):
        manifest = subject.data.manifest(subject.folder)
        names = files_in(manifest) if isinstance(manifest, Manifest) else ()
        yield fault_difference(dataset, (*names, TOKENIZER_FILE, MANIFEST))
        return
    splits = dict(dataset.splits)
    if dataset.has_test:
        splits[TEST] = dataset.open_test()
    for name, split in splits.items():
        yield from _split_faults(name, split, dataset)


def _split_faults(name: str, split: Split, dataset: Dataset) -> Iterator[Finding]:
    entry = dataset.manifest["splits"][name]
    for key, value in (
        ("stories", len(split.stories) - 1),
        ("tokens", len(split)),
        ("text_bytes", split.text_bytes),
    ):
        yield from unequal(MANIFEST, f"{key} of {name}", entry[key], value, "its files", exact=True)
    tokens = [len(shard) for shard in split.shards]
    listed = [shard["tokens"] for shard in entry["shards"]]
    yield from unequal(MANIFEST, f"tokens of the shards of {name}", listed, tokens, "the shards")
    # A story ends with the only end-of-text id in it.
    marks = [
        start + np.flatnonzero(shard == dataset.tokenizer.end_of_text) + 1
        for start, shard in zip(split.starts, split.shards, strict=False)
    ]
    if not np.array_equal(np.concatenate(marks), split.stories[1:, 0]):
        table = entry["stories_file"]
        yield Difference(table, f"{table} does not say where the stories of {name} end")
