"""The log of openings of the test split: a file that only grows, next to the records of experiments."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from storylab.files import atomic_path, exists, open_file

LOG_FILE = "test-openings.jsonl"


@dataclass(frozen=True)
class OpeningLine:
    """One showing of losses on the test split of a data set."""

    time: str
    fingerprint: str
    experiment: str
    seeds: int


@dataclass(frozen=True)
class OpeningLog:
    """The log as it was read; the lock of its folder keeps other processes from adding to it."""

    path: Path
    data: bytes

    @classmethod
    def read(cls, folder: Path) -> OpeningLog:
        """The log in the ``folder`` of the records; empty if there is none.

        Raises:
            UserError: the file cannot be read.
        """
        path = folder / LOG_FILE
        if not exists(path):
            return cls(path, b"")
        with open_file(path) as file:
            return cls(path, file.read())

    def append(self, line: OpeningLine) -> None:
        """Add a line to the file.

        Raises:
            UserError: the file cannot be written.
        """
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(self.data + msgspec.json.encode(line) + b"\n")

    def count(self, fingerprint: str) -> int:
        """Number of openings of a data set's test split when the log was read; lines that cannot be decoded
        count for every data set."""
        count = 0
        for text in self.data.splitlines():
            line = None
            with contextlib.suppress(msgspec.MsgspecError):
                line = msgspec.json.decode(text, type=OpeningLine)
            count += line is None or line.fingerprint == fingerprint
        return count
