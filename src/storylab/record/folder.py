"""The run folder: everything about one run, and the only source of truth about it.

``config.json``, ``data.json``, ``environment.json`` and ``tokenizer.tiktoken`` are written once at
the start, ``log.txt`` and ``metrics.jsonl`` grow a line at a time, ``checkpoints/`` and
``summary.json`` are replaced whole. ``stages.py`` begins, continues
and ends a run. docs/guide/run-folder.md describes each file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import msgspec

from storylab import config as configs
from storylab.checksums import Checksums, read_checksums, sha256_file
from storylab.config import TrainConfig
from storylab.data.layout import TOKENIZER_FILE
from storylab.decode import decode
from storylab.errors import UserError
from storylab.files import (
    Check,
    exists,
    open_file,
    read_json,
    read_record,
    sync_folder,
    write_error,
)
from storylab.record.schema import DataInfo, Environment, Row, Summary

if TYPE_CHECKING:
    import numpy as np

    from storylab.data.dataset import Dataset
    from storylab.data.tokenizer import Tokenizer

CONFIG, DATA, ENVIRONMENT, SUMMARY = "config.json", "data.json", "environment.json", "summary.json"
METRICS, LOG, PRECISION = "metrics.jsonl", "log.txt", "precision.json"
STORY_LOSSES, POSITION_LOSSES = "story_losses.npy", "position_losses.npy"
TEST_LOSSES = "test_losses.npy"
# Written by an experiment when a worker process ended without a summary.
FAILURE = "failure.json"


@dataclass(frozen=True)
class RunFolder:
    """A run folder, to read from and write to. Nothing is kept: every ``read`` reads the file.

    Methods that read raise a UserError if a file is missing, unreadable, damaged, or not what its checksum
    was made from; those that write, if the disk is full or the folder cannot be written.

    Attributes:
        folder: the run folder.
        checksums: of the folder, if they have been read already; else every ``read`` reads them first.
    """

    folder: Path
    checksums: Checksums | None = None
    writes: ClassVar[bool] = True
    """Whether this process writes the run; False where another process of the same run does."""

    def check(self, name: str) -> Check:
        """A check of the bytes of a file, which is read after this call, against its checksum."""
        known = self.checksums or read_checksums(self.folder)
        return lambda data: known.require(name, data)

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint ``best``, ``last`` or ``previous``."""
        return self.folder / "checkpoints" / f"{name}.safetensors"

    def read_config(self) -> TrainConfig:
        """Read the resolved config that the run was started with."""
        path = self.folder / CONFIG
        values = read_json(path, self.check(CONFIG))
        try:
            return configs.from_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def read_data(self) -> DataInfo:
        """Read fingerprint, vocabulary and sizes of the data set."""
        return read_record(self.folder / DATA, DataInfo, self.check(DATA))

    def read_environment(self) -> Environment:
        """Read code version, packages, device, and the hashes that prove which weights and data
        paired runs share."""
        return read_record(self.folder / ENVIRONMENT, Environment, self.check(ENVIRONMENT))

    def read_summary(self) -> Summary | None:
        """Read the results; None while the run has not ended."""
        path = self.folder / SUMMARY
        return read_record(path, Summary, self.check(SUMMARY)) if exists(path) else None

    def read_rows(self) -> list[Row]:
        """Read the rows of ``metrics.jsonl``, without a last line that a kill truncated."""
        path = self.folder / METRICS
        if not exists(path):
            return []
        check = self.check(METRICS)
        with open_file(path) as file:
            data = file.read()
        try:
            rows = _row_decoder().decode_lines(data)
        except (ValueError, RecursionError):
            # Decoding a line at a time is slower, but finds the wrong one.
            rows = [row for row, _ in rows_with_lines(data.splitlines(), path)]
        check(data)
        return rows

    def read_array(self, name: str, dimensions: int) -> np.ndarray:
        """Read losses by story or by position, see :func:`storylab.record.arrays.read_array`."""
        from storylab.record.arrays import read_array

        return read_array(self.folder / name, dimensions, self.check(name))

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer of the run's data."""
        from storylab.data.tokenizer import load_tokenizer

        path, expected = self.folder / TOKENIZER_FILE, self.read_data().tokenizer
        if not exists(path) or sha256_file(path) != expected.sha256:
            raise UserError(f"{path} is missing or altered: copy it again from the run's data set")
        return load_tokenizer(path, expected.name)

    def load_data(self, folder: Path) -> Dataset:
        """Load the data set in ``folder``, which must have the content of the run's."""
        from storylab.data.dataset import load_dataset

        dataset, expected = load_dataset(folder), self.read_data().fingerprint
        if dataset.fingerprint != expected:
            raise UserError(
                f"{folder} is not the data of this run: its fingerprint is "
                f"{dataset.fingerprint[:12]}, the run's {expected[:12]}; give the right --data_dir"
            )
        return dataset

    def sync_metrics(self) -> None:
        """Make the metrics so far survive a power cut; a checkpoint must not be ahead of them."""
        if (self.folder / METRICS).exists():
            with open(self.folder / METRICS, "rb+") as file:
                os.fsync(file.fileno())
            sync_folder(self.folder)  # the file may be new

    def append(self, file: str, line: str) -> None:
        """Add a line to ``log.txt`` or ``metrics.jsonl``; it leaves this process at once."""
        try:
            with open(
                self.folder / file, "a", encoding="utf-8", errors="replace", newline="\n"
            ) as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise write_error(self.folder / file, error) from error

    def append_rows(self, rows: Iterable[Row]) -> None:
        """Add rows to ``metrics.jsonl``, all in one write."""
        # Python's encoder refuses NaN, where msgspec's would write null.
        lines = [json.dumps(msgspec.to_builtins(row), allow_nan=False) for row in rows]
        if lines:
            self.append(METRICS, "\n".join(lines))

    def write_array(self, name: str, array: np.ndarray) -> None:
        """Replace ``story_losses.npy`` or ``test_losses.npy``, nats and predicted tokens of every
        validation or test story ``[stories, 2]``, or ``position_losses.npy``, mean nats of the targets at
        each position of a window ``[block_size]``; all float64."""
        from storylab.record.arrays import write_array

        write_array(self.folder / name, array)


@cache
def _row_decoder() -> msgspec.json.Decoder[Row]:
    return msgspec.json.Decoder(Row)


def rows_with_lines(lines: list[bytes], path: Path) -> Iterator[tuple[Row, bytes]]:
    """Rows with the lines that they were read from; a truncated last line is left out."""
    for number, line in enumerate(lines, start=1):
        try:
            yield parse_row(line, f"{path} line {number}"), line
        except UserError:
            if number < len(lines):
                raise


def parse_row(line: bytes, place: str) -> Row:
    """Decode a row of ``metrics.jsonl``.

    Raises:
        UserError: it is truncated, or a value in it is missing or of another type.
    """
    # A union of structs is a type to msgspec, though not to the checker.
    return decode(Row, line, place)  # type: ignore[arg-type]


def open_checked(folder: Path) -> RunFolder:
    """Open the run in ``folder`` and read its checksums, for several reads.

    Raises:
        UserError: there is no run, or the folder or its checksums cannot be read.
    """
    return RunFolder(open_run(folder).folder, read_checksums(folder))


def open_run(folder: Path) -> RunFolder:
    """Open the run in ``folder``, reading nothing yet.

    Raises:
        UserError: there is no run, or the folder cannot be read.
    """
    if not exists(folder / CONFIG):
        raise UserError(f"{folder} is not a run folder (it has no {CONFIG}): check the path")
    return RunFolder(folder)
