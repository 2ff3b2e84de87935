"""A prepared data set on disk: its manifest, its shards, and the checks before anything reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from storylab.checksums import read_checksums
from storylab.data.layout import READ_IN_TRAINING, SPLITS, TEST
from storylab.data.layout import TOKENIZER_FILE as TOKENIZER_FILE
from storylab.data.manifest import Manifest
from storylab.data.npy import parse_npy
from storylab.data.tokenizer import Tokenizer, load_tokenizer
from storylab.decode import convert, shown
from storylab.errors import UserError
from storylab.files import exists, open_file, read_json, reading

# Format 1 has no test split.
FORMAT_WITHOUT_TEST, FORMAT = 1, 2
MANIFEST = "manifest.json"
READ_BYTES = 1 << 24
REPAIR = "run `storylab prepare` again into a new folder"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest of uint16 and uint32 that holds every id of the vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def narrow_ids(ids: np.ndarray, vocab_size: int, dtype: np.dtype[Any]) -> np.ndarray:
    """``ids`` in ``dtype``, little-endian, after checking that none is lost by it.

    Raises:
        UserError: ``dtype`` cannot hold the vocabulary, or an id is outside of it.
    """
    check_vocabulary(vocab_size, dtype)
    if len(ids) and int(ids.max()) >= vocab_size:
        raise UserError(
            f"token id {int(ids.max())} is outside the vocabulary of {vocab_size}: "
            "the tokenizer and the ids do not belong together"
        )
    return ids.astype(dtype.newbyteorder("<"))


def check_vocabulary(vocab_size: int, dtype: np.dtype[Any]) -> None:
    """Raise a UserError if ids of a vocabulary of ``vocab_size`` would overflow ``dtype``."""
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise UserError(
            f"a vocabulary of {vocab_size} does not fit {dtype.name} token ids "
            f"(at most {np.iinfo(dtype).max + 1}): ids would overflow; {REPAIR}"
        )


@dataclass(frozen=True)
class Split:
    """Tokens of one split: an end-of-text id after every story, stories whole and in order.

    ``stories`` is ``[n + 1, 2]`` int64: at which token and at which byte of UTF-8 text (end-of-text
    not counted) each story begins, and where the last one ends.
    """

    name: str
    shards: tuple[np.ndarray, ...]
    starts: tuple[int, ...]
    stories: np.ndarray

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all stories."""
        return int(self.stories[-1, 1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop - 1`` as int64, across shard borders."""
        parts = [
            shard[max(start - begin, 0) : stop - begin]
            for shard, begin, end in zip(self.shards, self.starts, self.starts[1:], strict=False)
            if begin < stop and end > start
        ]
        return np.concatenate(parts).astype(np.int64)

    def windows(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Windows of ``length`` tokens that begin at ``starts``: ``[len(starts), length]`` int64.

        One gather for each shard rather than a read for each window: a GPU's host has no time to lose.
        """
        firsts = np.asarray(starts, dtype=np.int64)
        found = np.empty((len(firsts), length), dtype=np.int64)
        shard_of = np.searchsorted(self.starts, firsts, side="right") - 1
        across = firsts + length > np.asarray(self.starts)[shard_of + 1]
        for number in np.unique(shard_of[~across]):
            rows = (shard_of == number) & ~across
            places = (firsts[rows] - self.starts[number])[:, None] + np.arange(length)
            found[rows] = self.shards[number][places]
        for row in np.flatnonzero(across):
            found[row] = self.read(int(firsts[row]), int(firsts[row]) + length)
        return found


@dataclass(frozen=True)
class Dataset:
    """A prepared data set, checked against its manifest.

    ``splits`` are those that training reads. The test split stays closed until :meth:`open_test`.
    """

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    splits: dict[str, Split]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content: tokenizer, ids and story borders of all splits."""
        return str(self.manifest["fingerprint"])

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def tokens(self) -> dict[str, int]:
        """Number of tokens of each split."""
        entries = self.manifest["splits"]
        return {name: entries[name]["tokens"] for name in SPLITS if name in entries}

    @property
    def has_test(self) -> bool:
        """Whether it has a test split: data sets of earlier versions have none."""
        return TEST in self.manifest["splits"]

    def open_test(self) -> Split:
        """Open the test split, for the evaluation at the end of a run.

        Raises:
            UserError: a file of it is missing or altered.
        """
        return _load_split(self.folder, TEST, self.manifest, self.vocab_size)

    def require_window(self, block_size: int) -> None:
        """Raise a UserError if a split is shorter than one window of ``block_size`` and its targets."""
        for name, tokens in self.tokens.items():
            if tokens < block_size + 1:
                raise UserError(
                    f"the {name} split of {self.folder} has {tokens} tokens, fewer than "
                    f"one window of block_size {block_size} + 1: use a smaller --block_size or "
                    "prepare more text"
                )


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 of the parts of a manifest that identify the content, not where it came from."""
    splits = manifest["splits"]
    content = {
        "format": manifest["format"],
        "dtype": manifest["dtype"],
        "tokenizer": manifest["tokenizer"],
        "splits": {
            name: [[s["sha256"] for s in splits[name]["shards"]], splits[name]["stories_sha256"]]
            for name in SPLITS
            if name in splits
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_dataset(folder: Path) -> Dataset:
    """Open a prepared data set and check its files against the manifest.

    The files of the test split are only looked for: they are read where the split is opened.

    Raises:
        UserError: it does not exist, was made by another format, or a file is missing or altered.
    """
    if not exists(folder / MANIFEST):
        raise UserError(
            f"no prepared data in {folder}: run `storylab prepare` first, or give its --data_dir"
        )
    sums = read_checksums(folder)
    check = partial(sums.require, MANIFEST)
    manifest: dict[str, Any] = read_json(folder / MANIFEST, check)
    found = manifest.get("format", FORMAT) if isinstance(manifest, dict) else FORMAT
    if found not in (FORMAT_WITHOUT_TEST, FORMAT):
        raise UserError(f"{folder} has data of format {shown(found)}: {REPAIR}")
    try:
        convert(Manifest, manifest, str(folder / MANIFEST))
    except UserError as error:
        raise UserError(f"{error}; {REPAIR}") from error
    if manifest["fingerprint"] != fingerprint(manifest):
        raise UserError(f"{folder / MANIFEST} has been altered: {REPAIR}")
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE, manifest["tokenizer"]["name"])
    if tokenizer.sha256 != manifest["tokenizer"]["sha256"]:
        raise UserError(f"{folder / TOKENIZER_FILE} has been altered: {REPAIR}")
    check_vocabulary(tokenizer.vocab_size, np.dtype(manifest["dtype"]))
    splits = {
        name: _load_split(folder, name, manifest, tokenizer.vocab_size) for name in READ_IN_TRAINING
    }
    dataset = Dataset(folder, manifest, tokenizer, splits)
    if dataset.has_test:
        _find_test(folder, manifest)
    return dataset


def _find_test(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise a UserError if a file of the test split is missing or has another size than it should: a run
    would learn of it only at its end."""
    entry, width = manifest["splits"][TEST], np.dtype(manifest["dtype"]).itemsize
    sizes = {shard["file"]: shard["tokens"] * width for shard in entry["shards"]}
    for name, expected in {**sizes, entry["stories_file"]: None}.items():
        path = folder / name
        if not exists(path):
            raise UserError(f"{path} is missing: {REPAIR}")
        with reading(path):
            size = path.stat().st_size
        if expected is not None and size != expected:
            raise UserError(f"{path} is truncated or altered (its size differs): {REPAIR}")


def _load_split(folder: Path, name: str, manifest: dict[str, Any], vocab_size: int) -> Split:
    entry = manifest["splits"][name]
    shards, starts = [], [0]
    stored = np.dtype(manifest["dtype"]).newbyteorder("<")
    for shard in entry["shards"]:
        path = folder / shard["file"]
        if _check_file(path, shard, stored) >= vocab_size:
            raise UserError(f"{path} has token ids outside the vocabulary {vocab_size}: {REPAIR}")
        shards.append(np.memmap(path, dtype=stored, mode="r"))
        starts.append(starts[-1] + len(shards[-1]))
    return Split(name, tuple(shards), tuple(starts), _load_stories(folder, entry, starts[-1]))


def _load_stories(folder: Path, entry: dict[str, Any], tokens: int) -> np.ndarray:
    """The table of where the stories of a split of ``tokens`` tokens begin."""
    path = folder / entry["stories_file"]
    try:
        with open_file(path) as file:
            data = file.read()
    except UserError as error:
        raise UserError(f"{error}; {REPAIR}") from error
    if hashlib.sha256(data).hexdigest() != entry["stories_sha256"]:
        raise UserError(f"{path} is truncated or altered (its SHA-256 differs): {REPAIR}")
    table = parse_npy(data, "<i8", 2)
    if table is None or not _fits(table, tokens):
        raise UserError(f"{path} does not say where the stories of its shards begin: {REPAIR}")
    return table


def _fits(table: np.ndarray, tokens: int) -> bool:
    """Whether a table says where stories begin in so many tokens, in their order."""
    if len(table) < 1 or table.shape[1] != 2:
        return False
    ordered = (table[0] == 0).all() and (np.diff(table, axis=0) >= 0).all()
    return bool(ordered) and int(table[-1, 0]) == tokens


def _check_file(path: Path, shard: dict[str, Any], dtype: np.dtype[Any]) -> int:
    """The greatest value in a shard, whose size and hash are checked on the way.

    One pass in blocks: through a memory map, every page would count as this process's memory.
    """
    digest, greatest, size = hashlib.sha256(), 0, 0
    try:
        with open_file(path) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
                size += len(block)
                whole = len(block) // dtype.itemsize * dtype.itemsize
                greatest = max(greatest, int(np.frombuffer(block[:whole], dtype).max(initial=0)))
    except UserError as error:
        raise UserError(f"{error}; {REPAIR}") from error
    if digest.hexdigest() != shard["sha256"]:
        raise UserError(f"{path} is truncated or altered (its SHA-256 differs): {REPAIR}")
    if size != shard["tokens"] * dtype.itemsize:
        raise UserError(f"{path} has not the {shard['tokens']} tokens of {MANIFEST}: {REPAIR}")
    return greatest
