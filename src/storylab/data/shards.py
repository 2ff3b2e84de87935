"""Encode stories on every core and write their ids to shards; count stories that two splits share."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from storylab.data.dataset import narrow_ids
from storylab.data.layout import TRAIN
from storylab.data.tokenizer import Tokenizer
from storylab.data.vocabulary import NO_STORIES
from storylab.errors import UserError
from storylab.files import atomic_path

SHARD_TOKENS = 2**27
CHUNK_BYTES = 1 << 20


class OverlapFilter:
    """Stories that stream by, less those in splits that are held out from them, with their 64-bit hashes.

    Iterate once; ``hashes``, ``overlap`` (stories that were in each of ``others``) and ``duplicates``
    are of the stories so far. ``others`` is read when the iteration begins.
    """

    def __init__(
        self,
        stories: Iterator[str],
        others: Mapping[str, OverlapFilter] | None = None,
        keep: bool = False,
    ) -> None:
        self.hashes: array[int] = array("Q")
        self._stories, self._others, self._keep = stories, others or {}, keep
        self.overlap = dict.fromkeys(self._others, 0)

    def __iter__(self) -> Iterator[str]:
        others = {name: set(other.hashes) for name, other in self._others.items()}
        for story in self._stories:
            digest = hashlib.blake2b(story.encode(), digest_size=8).digest()
            value = int.from_bytes(digest, "little")
            if shared := [name for name, hashes in others.items() if value in hashes]:
                for name in shared:
                    self.overlap[name] += 1
                if not self._keep:
                    continue
            self.hashes.append(value)
            yield story

    def duplicates(self) -> int:
        """Stories that have been there before, word for word."""
        return len(self.hashes) - len(np.unique(np.asarray(self.hashes)))


class SplitWriter:
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
