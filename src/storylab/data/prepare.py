"""Turn stories into shards of token ids with a manifest: on every core, in bounded memory, all or
nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from storylab.checksums import add_checksums, write_checksums
from storylab.data.dataset import (
    FORMAT,
    FORMAT_WITHOUT_TEST,
    MANIFEST,
    TOKENIZER_FILE,
    Dataset,
    fingerprint,
    load_dataset,
    token_dtype,
)
from storylab.data.held_out import SplitStories
from storylab.data.layout import SPLITS, TEST, TRAIN
from storylab.data.prepare_config import PrepareConfig as PrepareConfig  # the public name
from storylab.data.shards import CHUNK_BYTES, OverlapFilter, SplitWriter
from storylab.data.sources import BuiltinSource, Source, hub_source, local_source
from storylab.data.tally import Tally
from storylab.data.tokenizer import Tokenizer, gpt2_tokenizer
from storylab.data.vocabulary import train_tokenizer
from storylab.errors import UserError
from storylab.files import read_json, reading, shown, write_json
from storylab.folders import whole_folder

Progress = Callable[[str, int, int | None], None]
"""Called with the name of the work, the bytes done, and the total of bytes (None: unknown)."""


# A few hours of preparing. The grammar repeats itself long before.
MAX_BUILTIN_STORIES = 100_000_000


def prepare(config: PrepareConfig, progress: Progress | None = None) -> Dataset:
    """Make the data set that ``config`` describes, or return it if it is already there.

    The folder appears only when everything in it is complete; the remains of a killed preparation
    are never mistaken for a data set, and the next one removes them.

    Raises:
        UserError: a source or tokenizer is not available, a split has no stories, the disk is full,
            or the folder holds something else.
    """
    _check_tokenizer_name(config.tokenizer)
    source = _source(config)
    request = {
        "source": source.describe(),
        "tokenizer": config.tokenizer,
        "keep_overlap": config.keep_overlap,
    }
    folder = config.folder
    if _in_use(folder):
        return _existing(folder, request)
    report = progress or (lambda name, done, total: None)
    if config.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer(config.tokenizer_dir)
    else:
        filters = _filters(SplitStories.of(source), lambda split: Tally())
        train = filters.pop(TRAIN)
        for stories in filters.values():
            for _ in stories:
                pass
        counted = _counted(train, "training the tokenizer", source.size_bytes(TRAIN), report)
        tokenizer = train_tokenizer(counted, int(config.tokenizer.removeprefix("bpe:")))
    write_dataset(folder, source, tokenizer, request, config.keep_overlap, report)
    return load_dataset(folder)


def _filters(
    stories: SplitStories, tally: Callable[[str], Tally], keep: bool = False
) -> dict[str, OverlapFilter]:
    """The stories of every split, each less those of the splits before it unless ``keep``.

    They are in the order in which they must be read: a split is compared with those before it.
    """
    filters: dict[str, OverlapFilter] = {}
    for split in stories.splits:
        filters[split] = OverlapFilter(stories(split, tally(split)), dict(filters), keep)
    return filters


def _in_use(folder: Path) -> bool:
    """Whether there is something in ``folder``.

    Raises:
        UserError: no data set can be made there.
    """
    with reading(folder):
        if not folder.exists():
            if folder.is_symlink():
                raise UserError(
                    f"{shown(folder)} is a link that leads nowhere: choose another --out"
                )
            return False
        if not folder.is_dir():
            raise UserError(f"{shown(folder)} is a file: choose another folder with --out")
        if folder.samefile(Path()):
            raise UserError("the data set needs a folder for itself: choose one with --out")
        return any(folder.iterdir())


def _check_tokenizer_name(name: str) -> None:
    size = name.removeprefix("bpe:")
    if name != "gpt2" and not (name.startswith("bpe:") and size.isdecimal() and len(size) < 10):
        raise UserError(f"unknown tokenizer '{name}': use gpt2, or bpe:N such as bpe:4096")


def _source(config: PrepareConfig) -> Source:
    if bool(config.train) != bool(config.validation):
        raise UserError("local files come in pairs: give both --train FILES and --validation FILES")
    if config.test and not config.train:
        raise UserError(
            "--test FILES goes with --train FILES and --validation FILES: give all three"
        )
    if config.train:
        return local_source(config.train, config.validation, config.test)
    if config.source == "builtin":
        if config.builtin_stories < 2:
            raise UserError("builtin_stories must be at least 2: one to train on, one to validate")
        if config.builtin_stories > MAX_BUILTIN_STORIES:
            raise UserError(
                f"builtin_stories is {config.builtin_stories}: the grammar has too few words to be worth "
                f"more than {MAX_BUILTIN_STORIES:,}"
            )
        return BuiltinSource(config.builtin_stories, config.builtin_seed)
    return hub_source(config.source)


def _existing(folder: Path, request: dict[str, Any]) -> Dataset:
    """The data set in ``folder`` if it is the one that ``config`` describes."""
    with reading(folder):
        made = (folder / MANIFEST).is_file()
    if not made:
        raise UserError(f"{folder} exists and is not a data set: choose another folder with --out")
    if _request_of(folder) != request:
        raise UserError(
            f"{folder} holds another data set (see its {MANIFEST}): choose another folder with "
            "--out, or delete that one"
        )
    return load_dataset(folder)


def _request_of(folder: Path) -> Any:
    manifest = read_json(folder / MANIFEST)
    return manifest.get("request") if isinstance(manifest, dict) else None


def write_dataset(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    request: dict[str, Any],
    keep_overlap: bool,
    report: Progress,
) -> None:
    """Write tokenizer, shards and manifest; ``folder`` appears when all are complete."""
    with whole_folder(folder) as partial:
        dtype = token_dtype(tokenizer.vocab_size)
        tokenizer.save(partial / TOKENIZER_FILE)
        stories = SplitStories.of(source)
        tallies = {split: Tally() for split in SPLITS}
        filters = _filters(stories, tallies.__getitem__, keep_overlap)
        splits: dict[str, Any] = {}
        for split, filtered in filters.items():
            writer = SplitWriter(partial, split, tokenizer, dtype)
            counted = _counted(filtered, split, stories.size_bytes(split), report)
            splits[split] = writer.write(counted) | {"duplicate_stories": filtered.duplicates()}
        manifest = {
            "format": FORMAT if TEST in splits else FORMAT_WITHOUT_TEST,
            "request": request,
            "tokenizer": _described(tokenizer),
            "dtype": dtype.name,
            "splits": splits,
            "test_origin": stories.test,
            "overlap": _overlaps(filters) | {"left_out": not keep_overlap},
            # Not content, so no part of the fingerprint.
            "reading": {
                split: dataclasses.asdict(tally)
                for split, tally in tallies.items()
                if split in splits and stories.has_own_files(split)
            },
        }
        manifest["fingerprint"] = fingerprint(manifest)
        write_json(partial / MANIFEST, manifest)
        write_checksums(partial, dict(_known_sums(splits)))
        add_checksums(partial, (MANIFEST, TOKENIZER_FILE))


def _known_sums(splits: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of every shard and table of stories."""
    for split in splits.values():
        yield from ((shard["file"], shard["sha256"]) for shard in split["shards"])
        yield split["stories_file"], split["stories_sha256"]


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "name": tokenizer.name,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
    }


def _overlaps(filters: Mapping[str, OverlapFilter]) -> dict[str, int]:
    """Number of stories of each split that are in another one too."""
    return {
        f"{split}_stories_in_{other}": count
        for split, filtered in filters.items()
        for other, count in filtered.overlap.items()
    }


def _counted(
    stories: Iterable[str], name: str, total: int | None, report: Progress
) -> Iterator[str]:
    done = since = 0
    for story in stories:
        yield story
        since += len(story)
        if since >= CHUNK_BYTES:
            done, since = done + since, 0
            report(name, done, total)
    report(name, done + since, done + since)
