"""The bytes of a run folder against its checksums, and its checkpoints against the record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from storylab.checksums import CHECKSUMS, read_checksums, sha256_file
from storylab.errors import UserError
from storylab.files import exists
from storylab.record import checkpoint
from storylab.record.folder import CONFIG, FAILURE, SUMMARY, RunFolder
from storylab.record.run import Run, load_run
from storylab.record.stages import (
    CHECKPOINTS,
    GROWING,
    Prefix,
    files_of,
    require_prefix,
)
from storylab.training.run_progress import RunProgress
from storylab.verify.data_sets import DataSets
from storylab.verify.findings import Depth, Difference, Finding, Gap, Progress, included, unequal


@dataclass(frozen=True)
class RunSubject:
    """A run to verify.

    Attributes:
        folder: the run folder.
        depth: see :class:`storylab.verify.findings.Check`.
        data: data sets that have been opened.
        data_dir: the run's data set, if it has moved.
        device: for evaluations; by default the run's own, where this machine has it.
        progress: shows how far long work is.
    """

    folder: Path
    depth: Depth
    data: DataSets
    data_dir: Path | None
    device: str | None
    progress: Progress

    @cached_property
    def run(self) -> Run:
        """The whole record.

        Raises:
            UserError: something in it is damaged.
        """
        return load_run(self.folder)

    @property
    def began(self) -> bool:
        """Whether there is a record: a worker process may fail before there is one."""
        return exists(self.folder / CONFIG) or exists(self.folder / SUMMARY)

    @property
    def data_folder(self) -> Path:
        """Where the run's data set should be."""
        return self.data_dir or self.run.config.data_dir

    @property
    def checkpoints(self) -> Iterator[str]:
        """Names of the checkpoints that the run has."""
        for name in ("last", "previous", "rewind", "best"):
            if exists(self.folder / CHECKPOINTS / f"{name}.safetensors"):
                yield name


def changed_bytes(subject: RunSubject) -> Iterator[Finding]:
    """Files whose bytes are not those that were written, or that are missing."""
    folder = subject.folder
    sums = read_checksums(folder).sums
    if not subject.began:
        yield Gap(f"the run failed before it began: it has {FAILURE} alone")
    if not sums:
        yield Gap(
            f"there is no {CHECKSUMS}, as in runs of earlier versions: whether a byte has changed is known "
            "of the tokenizer and the checkpoints alone"
        )
        return
    deep = included(subject.depth, "files")
    for name, expected in sums.items():
        if not exists(folder / name):
            yield Difference(name, f"{folder / name} is missing, and {CHECKSUMS} has it")
        elif (deep or not name.startswith(f"{CHECKPOINTS}/")) and _differs(folder / name, expected):
            yield Difference(
                name, f"{folder / name} has been altered: its SHA-256 is not the one in {CHECKSUMS}"
            )
    # A run under way has no checksums of rows, log and checkpoints yet; see checkpoint_faults.
    if SUMMARY in sums:
        for name in files_of(folder):
            if name not in sums:
                yield Gap(f"{name} is no file of the run: it has no checksum")


def _differs(path: Path, expected: str) -> bool:
    return sha256_file(path) != expected


def checkpoint_faults(subject: RunSubject) -> Iterator[Finding]:
    """Checkpoints that are damaged, or are not those of the rows and the summary."""
    run, folder = subject.run, RunFolder(subject.folder)
    for name in subject.checkpoints:
        file = f"{CHECKPOINTS}/{name}.safetensors"
        try:
            _, values = checkpoint.load(folder.checkpoint(name))
            if name == "best":
                yield from _best_faults(run, file, values)
                continue
            progress = RunProgress.from_dict(values)
        except UserError as error:
            yield Difference(file, str(error))
            continue
        yield from _prefix_faults(subject, name, progress.prefixes)
        if name == "last" and run.summary is not None:
            yield from _last_faults(run, file, progress)
    if run.finished and "last" not in subject.checkpoints:
        yield Difference(f"{CHECKPOINTS}/last.safetensors", "the last checkpoint is missing")


def _best_faults(run: Run, file: str, values: dict[str, object]) -> Iterator[Finding]:
    if run.summary is None:
        return
    found = values.get("iteration"), values.get("val_loss")
    best = run.summary.best_iteration, run.summary.best_val_loss
    yield from unequal(file, "its iteration and loss", found, best, SUMMARY, exact=True)


def _last_faults(run: Run, file: str, progress: RunProgress) -> Iterator[Finding]:
    summary = run.results
    # A diverged run keeps the checkpoint from before the fault.
    if run.finished:
        for name, value in (
            ("next_iteration", summary.iterations),
            ("train_loss", summary.final_train_loss),
            ("val_loss", summary.final_val_loss),
            ("best_val_loss", summary.best_val_loss),
            ("best_iteration", summary.best_iteration),
        ):
            yield from unequal(file, name, getattr(progress, name), value, SUMMARY, exact=True)


def _prefix_faults(
    subject: RunSubject, name: str, prefixes: dict[str, Prefix]
) -> Iterator[Finding]:
    """Rows and log of a run under way that are not those which the checkpoint has the checksum of."""
    if SUMMARY in read_checksums(subject.folder).sums:
        return
    for file in GROWING:
        try:
            require_prefix(subject.folder, file, prefixes)
        except UserError as error:
            yield Difference(file, str(error))
    if name == "last":
        yield from _gaps(subject.folder, prefixes)


def _gaps(folder: Path, prefixes: dict[str, Prefix]) -> Iterator[Gap]:
    for file in GROWING:
        known = prefixes[file].bytes if file in prefixes else 0
        size = (folder / file).stat().st_size if exists(folder / file) else 0
        if size > known:
            yield Gap(
                f"{size - known} bytes of {file} are newer than the newest checkpoint, which has the "
                "checksum of those before them"
            )
