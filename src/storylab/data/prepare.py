"""From stories to shards of token ids with a manifest: every core, bounded memory, all or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from storylab.data.dataset import (
    FORMAT,
    MANIFEST,
    TOKENIZER_FILE,
    Dataset,
    fingerprint,
    load_dataset,
    narrow_ids,
    token_dtype,
)
from storylab.data.layout import SPLITS, TRAIN, VALIDATION
from storylab.data.reading import clean
from storylab.data.sources import BuiltinSource, Source, hub_source, local_source
from storylab.data.tally import Tally
from storylab.data.tokenizer import NO_STORIES, Tokenizer, gpt2_tokenizer, train_tokenizer
from storylab.errors import UserError
from storylab.files import (
    atomic_path,
    exclusive,
    read_json,
    reading,
    shown,
    sync_folder,
    write_error,
    write_json,
)

SHARD_TOKENS = 2**27
CHUNK_BYTES = 1 << 20

Progress = Callable[[str, int, int | None], None]
"""Called with the name of the work, the bytes done, and the bytes in all (None: unknown)."""


# A few hours of preparing. The grammar repeats itself long before.
MAX_BUILTIN_STORIES = 100_000_000


@dataclass(frozen=True)
class PrepareConfig:
    """Turn stories into a data set to train on.

    Examples: storylab prepare | storylab prepare --source builtin --tokenizer bpe:1024
    | storylab prepare --train a.parquet b.txt --validation c.txt --out data/mine
    """

    source: Literal["tinystories", "tinystories-v2", "tinystories-gpt4-clean", "builtin"] = (
        "tinystories"
    )
    """A data set of the Hugging Face hub, or the built-in corpus; not used with --train."""
    train: tuple[Path, ...] = ()
    """Local training stories: .txt (<|endoftext|> between stories), .parquet, .jsonl, also .gz, .zst."""
    validation: tuple[Path, ...] = ()
    """Local validation stories."""
    tokenizer: str = "gpt2"
    """gpt2 (50,257 ids), or bpe:N to train N ids on the training stories (bpe:4096 suits small models)."""
    tokenizer_dir: Path | None = None
    """Folder with GPT-2's vocab.bpe and encoder.json; by default the installed copy."""
    out: Path | None = None
    """Folder to write; by default data/SOURCE-TOKENIZER."""
    keep_overlap: bool = False
    """Keep training stories that also are validation stories (they are left out otherwise)."""
    builtin_stories: int = 20_000
    """How many stories the built-in corpus has."""
    builtin_seed: int = 0
    """Seed of the built-in corpus."""

    @property
    def folder(self) -> Path:
        """Where the data set goes."""
        name = "files" if self.train else self.source
        return self.out or Path("data") / f"{name}-{self.tokenizer.replace(':', '')}"


def prepare(config: PrepareConfig, progress: Progress | None = None) -> Dataset:
    """Make the data set that ``config`` describes, or return it if it is already there.

    The folder appears only when everything in it is complete; what a killed preparation leaves
    behind is never mistaken for a data set and is cleared by the next one.

    Raises:
        UserError: a source or tokenizer cannot be had, a split has no stories, the disk is full,
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
        held_out = OverlapFilter(_stories(source, VALIDATION, Tally()))
        for _ in held_out:
            pass
        stories = OverlapFilter(_stories(source, TRAIN, Tally()), held_out.hashes)
        counted = _counted(stories, "training the tokenizer", source.size_bytes(TRAIN), report)
        tokenizer = train_tokenizer(counted, int(config.tokenizer.removeprefix("bpe:")))
    write_dataset(folder, source, tokenizer, request, config.keep_overlap, report)
    return load_dataset(folder)


def _stories(source: Source, split: str, tally: Tally) -> Iterator[str]:
    return clean(source.texts(split, tally), tally)


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
            raise UserError("the data set needs a folder of its own: choose one with --out")
        return any(folder.iterdir())


def _check_tokenizer_name(name: str) -> None:
    size = name.removeprefix("bpe:")
    if name != "gpt2" and not (name.startswith("bpe:") and size.isdecimal() and len(size) < 10):
        raise UserError(f"unknown tokenizer '{name}': use gpt2, or bpe:N such as bpe:4096")


def _source(config: PrepareConfig) -> Source:
    if bool(config.train) != bool(config.validation):
        raise UserError("local files come in pairs: give both --train FILES and --validation FILES")
    if config.train:
        return local_source(config.train, config.validation)
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
    """The data set in ``folder`` if it is what was asked for."""
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
    with _whole_or_nothing(folder) as partial:
        dtype = token_dtype(tokenizer.vocab_size)
        tokenizer.save(partial / TOKENIZER_FILE)
        # Validation first: training stories are compared with it while they stream by.
        tallies = {split: Tally() for split in SPLITS}
        held_out = OverlapFilter(_stories(source, VALIDATION, tallies[VALIDATION]))
        read = _stories(source, TRAIN, tallies[TRAIN])
        train = OverlapFilter(read, held_out.hashes, keep_overlap)
        splits: dict[str, Any] = {}
        for split, stories in ((VALIDATION, held_out), (TRAIN, train)):
            writer = _SplitWriter(partial, split, tokenizer, dtype)
            counted = _counted(stories, split, source.size_bytes(split), report)
            splits[split] = writer.write(counted) | {"duplicate_stories": stories.duplicates()}
        manifest = {
            "format": FORMAT,
            "request": request,
            "tokenizer": {
                "name": tokenizer.name,
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
            },
            "dtype": dtype.name,
            "splits": splits,
            "overlap": {
                "train_stories_in_validation": train.overlap,
                "left_out": not keep_overlap,
            },
            # Beside the content, so no part of the fingerprint.
            "reading": {split: dataclasses.asdict(tally) for split, tally in tallies.items()},
        }
        manifest["fingerprint"] = fingerprint(manifest)
        write_json(partial / MANIFEST, manifest)


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, locked; it takes that place when the block ends well."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with exclusive(partial):
            for left_by_a_kill in partial.iterdir():
                left_by_a_kill.unlink()
            try:
                yield partial
                if folder.exists():
                    folder.rmdir()  # empty, or the caller would not have come here
                os.rename(partial, folder)
                sync_folder(folder.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else folder
        raise write_error(place, error) from error


class OverlapFilter:
    """Stories that stream by, less those in a set of others, with their 64-bit hashes.

    Iterate once; ``hashes``, ``overlap`` (stories that were in the set) and ``duplicates`` are of
    the stories so far. ``others`` is read when the iteration begins.
    """

    def __init__(
        self, stories: Iterator[str], others: Iterable[int] = (), keep: bool = False
    ) -> None:
        self.hashes: array[int] = array("Q")
        self.overlap = 0
        self._stories, self._others, self._keep = stories, others, keep

    def __iter__(self) -> Iterator[str]:
        others = set(self._others)
        for story in self._stories:
            digest = hashlib.blake2b(story.encode(), digest_size=8).digest()
            value = int.from_bytes(digest, "little")
            if value in others:
                self.overlap += 1
                if not self._keep:
                    continue
            self.hashes.append(value)
            yield story

    def duplicates(self) -> int:
        """Stories that have been there before, word for word."""
        return len(self.hashes) - len(np.unique(np.asarray(self.hashes)))


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


class _SplitWriter:
    """Encodes stories on all cores and writes their ids in order to shards of bounded size."""

    def __init__(
        self, folder: Path, split: str, tokenizer: Tokenizer, dtype: np.dtype[Any]
    ) -> None:
        self.folder, self.split, self.tokenizer, self.dtype = folder, split, tokenizer, dtype
        self.shards: list[dict[str, Any]] = []
        self.file: BinaryIO | None = None
        self.digest = hashlib.sha256()
        self.in_shard = 0

    def write(self, stories: Iterable[str]) -> dict[str, Any]:
        """Write all stories; the split's entry in the manifest."""
        lengths: list[np.ndarray] = [np.zeros((1, 2), dtype=np.int64)]
        for ids, chunk_lengths in _encode_in_order(stories, self.tokenizer):
            self._append(narrow_ids(ids, self.tokenizer.vocab_size, self.dtype))
            lengths.append(chunk_lengths)
        if len(lengths) == 1:
            if self.split == TRAIN:
                raise UserError(NO_STORIES)
            raise UserError(f"the {self.split} split has no stories: give files with some text")
        self._close()
        offsets = np.concatenate(lengths).cumsum(axis=0)
        name = f"{self.split}.stories.npy"
        with atomic_path(self.folder / name) as temporary, open(temporary, "wb") as file:
            np.save(file, offsets, allow_pickle=False)
        return {
            "stories": len(offsets) - 1,
            "tokens": int(offsets[-1, 0]),
            "text_bytes": int(offsets[-1, 1]),
            "shards": self.shards,
            "stories_file": name,
            "stories_sha256": hashlib.sha256((self.folder / name).read_bytes()).hexdigest(),
        }

    def _append(self, ids: np.ndarray) -> None:
        for start in range(0, len(ids), SHARD_TOKENS):
            part = ids[start : start + SHARD_TOKENS]
            if self.in_shard and self.in_shard + len(part) > SHARD_TOKENS:
                self._close()
            if self.file is None:
                path = self.folder / f"{self.split}-{len(self.shards):05d}.bin"
                self.file = open(path, "wb")  # noqa: SIM115 - closed by _close
            data = part.tobytes()
            self.file.write(data)
            self.digest.update(data)
            self.in_shard += len(part)

    def _close(self) -> None:
        assert self.file is not None
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        entry = {"tokens": self.in_shard, "sha256": self.digest.hexdigest()}
        self.shards.append({"file": Path(self.file.name).name, **entry})
        self.file, self.digest, self.in_shard = None, hashlib.sha256(), 0


def _encode_in_order(
    stories: Iterable[str], tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and story lengths of chunks of stories, encoded by threads, yielded in order."""

    def encode(chunk: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = tokenizer.encode_stories(chunk)
        ends = np.flatnonzero(ids == tokenizer.end_of_text) + 1
        tokens = np.diff(ends, prepend=0)
        text_bytes = [len(story.encode()) for story in chunk]
        return ids, np.stack([tokens, np.asarray(text_bytes)], axis=1).astype(np.int64)

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        for chunk in _chunks(stories):
            pending.append(pool.submit(encode, chunk))
            # Two chunks a worker keep all of them busy and the memory bounded.
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _chunks(stories: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for story in stories:
        chunk.append(story)
        size += len(story)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
