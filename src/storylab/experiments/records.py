"""Find, read and keep the records of experiments in a folder of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from storylab.config import current_name
from storylab.decode import decode
from storylab.errors import UserError
from storylab.experiments.experiment import METRICS
from storylab.experiments.factorial import design_faults
from storylab.experiments.factors import qualified_name
from storylab.files import exists, json_of, open_file, reading, write_json
from storylab.record.experiment_schema import ExperimentRecord
from storylab.record.index import RunCache

# The folder in RUNS with one file for each experiment.
EXPERIMENTS = "experiments"
Stamp = tuple[int, int, int, int]
"""Inode, times of the last change of content and of the inode in nanoseconds, and size of a file."""


def experiment_records(runs: Path) -> list[Path]:
    """Records of the experiments in a folder of runs, in the order of their names.

    Raises:
        UserError: the folder cannot be read.
    """
    folder = runs / EXPERIMENTS
    if not exists(folder):
        return []
    with reading(folder):
        return sorted(path for path in folder.iterdir() if path.suffix == ".json")


def read_experiment(path: Path) -> ExperimentRecord:
    """Read an experiment's record, with the current names of config fields as its factors.

    Raises:
        UserError: it cannot be read, or something in it is missing, of another type or does not fit the
            rest.
    """
    return _read(path).record


@dataclass(frozen=True)
class _KnownRecord:
    """A record as it was read."""

    stamp: Stamp
    data: bytes
    record: ExperimentRecord


class FolderCache(RunCache):
    """Runs and records of experiments that have been read; each is read again only if its files change.

    Another process may write a record at any time, so every use of it compares its file with the one that
    was read.
    """

    def __init__(self) -> None:
        super().__init__()
        self._records: dict[Path, _KnownRecord] = {}

    def record(self, path: Path) -> ExperimentRecord:
        """The record in a file, as :func:`read_experiment` reads it.

        Raises:
            UserError: see there.
        """
        return self._known(path).record

    def save_record(self, path: Path, values: dict[str, Any]) -> None:
        """Write keys of a record over those of its file, if there is one. All other keys stay, those of a
        later version too. The caller holds the lock of the folder.

        Args:
            path: file of the record.
            values: plain JSON values by key.

        Raises:
            UserError: the file cannot be read or written.
        """
        earlier = json_of(self._known(path).data, path) if exists(path) else {}
        merged = earlier | values
        write_json(path, merged)
        self._records[path] = _checked(path, _stamp(path), json.dumps(merged).encode())

    def _known(self, path: Path) -> _KnownRecord:
        known = self._records.get(path)
        if known is None or known.stamp != _stamp(path):
            known = self._records[path] = _read(path)
        return known


def _read(path: Path) -> _KnownRecord:
    # Taken before the reading: if the file is replaced in between, the next use sees the difference.
    stamp = _stamp(path)
    with open_file(path) as file:
        return _checked(path, stamp, file.read())


def _checked(path: Path, stamp: Stamp, data: bytes) -> _KnownRecord:
    """The record in the bytes of a file."""
    record = decode(ExperimentRecord, data, str(path))
    if fault := next(_record_faults(record), None):
        raise UserError(f"{path} is damaged: {fault}")
    return _KnownRecord(stamp, data, _with_current_factors(record))


def _with_current_factors(record: ExperimentRecord) -> ExperimentRecord:
    design = record.factorial
    if design is not None:
        factors = [
            structs.replace(factor, fields=sorted(map(current_name, factor.fields)))
            for factor in design.factors
        ]
        design = structs.replace(design, factors=factors)
    return structs.replace(record, factor=current_name(record.factor), factorial=design)


def _stamp(path: Path) -> Stamp:
    with reading(path):
        found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _record_faults(record: ExperimentRecord) -> Iterator[str]:
    """Contradictions within a record."""
    cells = [(cell.condition, cell.arm) for cell in record.cells]
    if not cells:
        yield "it has no cells"
    if len(set(cells)) < len(cells):
        yield "a cell is there twice"
    for condition, arm in cells:
        if arm not in record.arms or condition not in record.conditions:
            yield f"the cell '{qualified_name(arm, condition)}' is not of its arms and conditions"
        if (condition, record.baseline) not in cells:
            yield f"there is no baseline '{qualified_name(record.baseline, condition)}'"
    for cell in record.cells:
        for seed, name in cell.runs.items():
            if not re.fullmatch(r"\d{1,19}", seed, re.ASCII):
                yield f"'{seed}' is no seed"
            if name in ("", ".", "..") or "/" in name or "\0" in name:
                yield f"{name!r} is no name of a run folder"
    yield from design_faults(record)
    for expectation in record.expectations:
        if expectation.metric not in METRICS:
            yield f"there is no metric '{expectation.metric}'"
