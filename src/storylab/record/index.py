"""Many runs: the summaries of a folder of runs, and runs kept for as long as their files stay the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from storylab.checksums import Checksums
from storylab.errors import UserError
from storylab.files import exists, open_file, reading
from storylab.record.folder import (
    CONFIG,
    DATA,
    ENVIRONMENT,
    FAILURE,
    METRICS,
    POSITION_LOSSES,
    PRECISION,
    STORY_LOSSES,
    SUMMARY,
    TEST_LOSSES,
    RunFolder,
)
from storylab.record.run import (
    DAMAGED,
    ENDED,
    FAILED,
    FINISHED,
    Run,
    RunHead,
    load_run,
    read_head,
    run_state,
)
from storylab.record.schema import Summary

T = TypeVar("T")
Stamps = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class RunEntry:
    """One run folder at a glance; None where a number is not known."""

    name: str
    state: str
    parameters: int | None = None
    tokens: int | None = None
    loss: float | None = None
    """Loss on the whole validation split of a finished run, in nats a token."""
    speed: float | None = None
    """Tokens a second of the median iteration of a run that has ended."""
    memory: int | None = None
    """Peak memory in bytes, evaluations included."""
    started: str = ""
    fault: str = ""
    """Why a run is damaged."""


def list_runs(runs: Path) -> Iterator[RunEntry]:
    """Yield an entry for every run folder in ``runs``, a damaged one with its fault.

    Of a run that has ended only the summary is read, and its other files are looked for; they are read
    where the summary is of a version that did not hold speed and memory. Other runs are read whole.

    Raises:
        UserError: ``runs`` cannot be read.
    """
    for folder in run_folders(runs):
        try:
            yield list_run(folder)
        except UserError as error:
            yield RunEntry(folder.name, DAMAGED, fault=str(error))


def list_run(folder: Path) -> RunEntry:
    """The entry of one run folder; see :func:`list_runs`.

    Raises:
        UserError: the run is damaged.
    """
    with reading(folder), os.scandir(folder) as entries:
        found = {entry.name: entry for entry in entries}
    # A second file for each run would double the time of a listing, so checksums are not read.
    unchecked = RunFolder(folder, Checksums(folder))
    summary = unchecked.read_summary() if SUMMARY in found else None
    if summary is None:
        state, reason = run_state(folder)
        if state == FAILED:
            return RunEntry(folder.name, state)
        if state == DAMAGED:
            raise UserError(reason)
        run = load_run(folder)
        return RunEntry(folder.name, state, started=run.environment.started)
    started, speed = summary.started, summary.median_tokens_per_second
    if not started:  # a summary of an earlier version
        run = load_run(folder)
        started, speed = run.environment.started, run.speed
    for name in _files(summary, found):
        _require_file(folder / name, found.get(name))
    return RunEntry(
        folder.name,
        summary.status,
        summary.parameters,
        summary.tokens,
        summary.validation.loss if summary.validation else None,
        speed,
        summary.peak_memory_bytes,
        started,
    )


def _require_file(path: Path, entry: os.DirEntry[str] | None) -> None:
    """Raise a UserError if a file of a folder is missing, or is no file."""
    if entry is None:
        raise UserError(f"{path} is missing: restore it from a copy")
    with reading(path):
        regular = entry.is_file()
    if not regular:
        with open_file(path):
            pass  # whose message describes the path


def _files(summary: Summary, found: dict[str, os.DirEntry[str]]) -> Iterator[str]:
    """Names of the files that a run with this summary must have."""
    yield from (CONFIG, DATA, ENVIRONMENT)
    if summary.iterations:
        yield METRICS
    if summary.status == FINISHED:
        yield STORY_LOSSES
    if summary.test is not None:
        yield TEST_LOSSES
    if summary.validation and summary.validation.block_size is not None:
        yield POSITION_LOSSES
    if PRECISION in found:
        yield PRECISION


def run_folders(runs: Path) -> list[Path]:
    """Folders in ``runs`` that hold a run or part of one, and unreadable folders, sorted by name.

    Raises:
        UserError: ``runs`` itself cannot be read.
    """
    with reading(runs):
        entries = sorted(runs.iterdir())
    return [entry for entry in entries if _may_be_run(entry)]


def _may_be_run(entry: Path) -> bool:
    try:
        return any(exists(entry / name) for name in (CONFIG, SUMMARY, FAILURE))
    except UserError:
        return True


@dataclass
class _Kept(Generic[T]):
    """Values read from folders, each for as long as the files in its folder stay as they are."""

    read: Callable[[Path], T]
    values: dict[Path, tuple[Stamps, T | UserError]] = field(default_factory=dict)

    def get(self, folder: Path, stamps: Stamps) -> T:
        if folder not in self.values or self.values[folder][0] != stamps:
            value: T | UserError
            try:
                value = self.read(folder)
            except UserError as error:
                value = error
            self.values[folder] = stamps, value
        found = self.values[folder][1]
        if isinstance(found, UserError):
            raise UserError(str(found))
        return found


class RunCache:
    """Runs that have been read; a run is read again only if a file in its folder has changed since."""

    def __init__(self) -> None:
        self._heads: _Kept[RunHead] = _Kept(read_head)
        self._runs: _Kept[Run] = _Kept(lambda folder: load_run(folder, self.head(folder)))

    def head(self, folder: Path) -> RunHead:
        """Config and data of a run, as :func:`~storylab.record.run.read_head` reads them.

        Raises:
            UserError: there is no run, or one of the two is damaged.
        """
        return self._heads.get(folder, _stamps(folder))

    def load(self, folder: Path) -> Run:
        """The whole run, as :func:`~storylab.record.run.load_run` reads it.

        Raises:
            UserError: there is no run, or it is damaged.
        """
        return self._runs.get(folder, _stamps(folder))

    def state(self, folder: Path) -> tuple[str, str]:
        """State of a run folder and the reason for it; a run that has ended counts as damaged unless all of
        its record can be read."""
        try:
            run = self.load(folder)
        except UserError as error:
            state, reason = run_state(folder)
            return (DAMAGED, str(error)) if state in ENDED else (state, reason)
        return run.state, run.reason


def _stamps(folder: Path) -> Stamps:
    """Name, time of the last change and size of the files in a folder; empty if it does not exist."""
    if not exists(folder):
        return ()
    with reading(folder):
        if not folder.is_dir():
            return ()
        stats = [(path.name, path.lstat()) for path in folder.iterdir()]
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats))
