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


def log_opening(folder: Path, line: OpeningLine) -> None:
    """Add a line to the log in the ``folder`` of the records.

    Raises:
        UserError: the file cannot be read or written.
    """
    path, before = folder / LOG_FILE, b""
    if exists(path):
        with open_file(path) as file:
            before = file.read()
    with atomic_path(path) as temporary:
        temporary.write_bytes(before + msgspec.json.encode(line) + b"\n")


def logged_openings(folder: Path, fingerprint: str) -> int:
    """Number of openings of a data set's test split; lines that cannot be read count for every data set."""
    path = folder / LOG_FILE
    if not exists(path):
        return 0
    with open_file(path) as file:
        lines = file.read().splitlines()
    count = 0
    for text in lines:
        line = None
        with contextlib.suppress(msgspec.MsgspecError):
            line = msgspec.json.decode(text, type=OpeningLine)
        count += line is None or line.fingerprint == fingerprint
    return count
