"""The run folder: everything about one run, and the only source of truth about it.

``config.json``, ``data.json``, ``environment.json`` and ``tokenizer.tiktoken`` are written once at
the start, ``log.txt`` and ``metrics.jsonl`` grow a line at a time, ``checkpoints/`` and
``summary.json`` are replaced whole. docs/guide/run-folder.md describes each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from storylab import config as configs
from storylab.config import TrainConfig
from storylab.data.dataset import TOKENIZER_FILE, Dataset, load_dataset
from storylab.data.tokenizer import Tokenizer, load_tokenizer
from storylab.decode import decode
from storylab.errors import UserError
from storylab.files import (
    atomic_path,
    exists,
    open_file,
    read_json,
    read_record,
    reading,
    sha256_file,
    write_error,
    write_json,
)
from storylab.record.arrays import write_array
from storylab.record.provenance import current_stage
from storylab.record.schema import DataInfo, Environment, Resumption, Row, Summary

CONFIG, DATA, ENVIRONMENT, SUMMARY = "config.json", "data.json", "environment.json", "summary.json"
METRICS, LOG, PRECISION = "metrics.jsonl", "log.txt", "precision.json"
STORY_LOSSES, POSITION_LOSSES = "story_losses.npy", "position_losses.npy"
TEST_LOSSES = "test_losses.npy"
# Written by an experiment when a worker process ended without a summary.
FAILURE = "failure.json"


@dataclass(frozen=True)
class RunFolder:
    """A run folder, to read from and write to. Nothing is kept: every ``read`` reads the file.

    Methods that read raise a UserError if a file is missing, unreadable or damaged; those that write, if
    the disk is full or the folder cannot be written.
    """

    folder: Path

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint ``best`` or ``last``."""
        return self.folder / "checkpoints" / f"{name}.safetensors"

    def read_config(self) -> TrainConfig:
        """Read the resolved config that the run was started with."""
        path = self.folder / CONFIG
        values = read_json(path)
        try:
            return configs.from_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def read_data(self) -> DataInfo:
        """Read fingerprint, vocabulary and sizes of the data set."""
        return read_record(self.folder / DATA, DataInfo)

    def read_environment(self) -> Environment:
        """Read code version, packages, device, and the hashes that prove which weights and data
        paired runs share."""
        return read_record(self.folder / ENVIRONMENT, Environment)

    def read_summary(self) -> Summary | None:
        """Read the results; None while the run has not ended."""
        path = self.folder / SUMMARY
        return read_record(path, Summary) if exists(path) else None

    def read_rows(self) -> list[Row]:
        """Read the rows of ``metrics.jsonl``, without a last line that a kill truncated."""
        path = self.folder / METRICS
        if not exists(path):
            return []
        with open_file(path) as file:
            data = file.read()
        try:
            return _row_decoder().decode_lines(data)
        except (ValueError, RecursionError):
            # Decoding a line at a time is slower, but finds the wrong one.
            return [row for row, _ in _rows(data.splitlines(), path)]

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer of the run's data."""
        path, expected = self.folder / TOKENIZER_FILE, self.read_data().tokenizer
        if not exists(path) or sha256_file(path) != expected.sha256:
            raise UserError(f"{path} is missing or altered: copy it again from the run's data set")
        return load_tokenizer(path, expected.name)

    def load_data(self, folder: Path) -> Dataset:
        """Load the data set in ``folder``, which must have the content of the run's."""
        dataset, expected = load_dataset(folder), self.read_data().fingerprint
        if dataset.fingerprint != expected:
            raise UserError(
                f"{folder} is not the data of this run: its fingerprint is "
                f"{dataset.fingerprint[:12]}, the run's {expected[:12]}; give the right --data_dir"
            )
        return dataset

    def truncate_to(
        self, next_iteration: int, config: TrainConfig, findings: Mapping[str, Any]
    ) -> None:
        """Prepare the folder to continue at ``next_iteration``: drop everything after it, record
        the new stage.

        Args:
            next_iteration: number of iterations that the checkpoint has done.
            config: the config to continue with.
            findings: results of the checks before the first step, fields of
                :class:`~storylab.record.schema.Stage`.
        """
        kept = self._lines_before(next_iteration)
        with atomic_path(self.folder / METRICS) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        for stale in (SUMMARY, STORY_LOSSES, POSITION_LOSSES, TEST_LOSSES):
            (self.folder / stale).unlink(missing_ok=True)
        self.read_environment()
        # As plain JSON, so that keys of a later version stay.
        record = read_json(self.folder / ENVIRONMENT)
        stage = msgspec.structs.asdict(current_stage())
        again = Resumption(**stage | dict(findings), iteration=next_iteration)
        resumed = [*record.get("resumed", []), msgspec.to_builtins(again)]
        write_json(self.folder / ENVIRONMENT, record | {"resumed": resumed})
        write_json(self.folder / CONFIG, configs.to_dict(config))

    def _lines_before(self, next_iteration: int) -> list[bytes]:
        path, kept, found = self.folder / METRICS, [], 0
        lines: list[bytes] = []
        if next_iteration and exists(path):
            with open_file(path) as file:
                lines = file.read().splitlines()
        # The lines that follow may be the remains of a power cut, and are not decoded.
        for row, line in _rows(lines, path):
            if row.iteration < next_iteration:
                kept.append(line)
                found += type(row).__struct_config__.tag == "iteration"
            if found == next_iteration:
                break
        if found != next_iteration:
            raise UserError(
                f"{path} has {found} of the {next_iteration} iterations that the "
                "checkpoint has done: restore it from a copy"
            )
        return kept

    def sync_metrics(self) -> None:
        """Make the metrics so far survive a power cut; a checkpoint must not be ahead of them."""
        if (self.folder / METRICS).exists():
            with open(self.folder / METRICS, "rb+") as file:
                os.fsync(file.fileno())

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
        write_array(self.folder / name, array)

    def write_summary(self, summary: Summary) -> None:
        """Replace ``summary.json``."""
        write_json(self.folder / SUMMARY, msgspec.to_builtins(summary))


@cache
def _row_decoder() -> msgspec.json.Decoder[Row]:
    return msgspec.json.Decoder(Row)


def _rows(lines: list[bytes], path: Path) -> Iterator[tuple[Row, bytes]]:
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


def create_run(config: TrainConfig, dataset: Dataset, identity: Mapping[str, Any]) -> RunFolder:
    """Make the folder ``config.out_dir`` and write everything known before the first iteration.

    Args:
        config: the resolved config.
        dataset: the data set to train on.
        identity: the fields of :class:`~storylab.record.schema.Environment` that a
            :class:`~storylab.record.schema.Stage` lacks, and the findings of the checks of compiled code.

    Raises:
        UserError: the folder has something in it already, or cannot be written.
    """
    assert config.out_dir is not None
    folder = config.out_dir
    data = {key: dataset.manifest.get(key) for key in ("fingerprint", "tokenizer", "dtype")}
    data["request"] = dataset.manifest.get("request")
    data["tokens"] = dataset.tokens
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_free(folder)
        (folder / "checkpoints").mkdir(exist_ok=True)
        dataset.tokenizer.save(folder / TOKENIZER_FILE)
        write_json(folder / DATA, data)
        environment = Environment(**msgspec.structs.asdict(current_stage()) | dict(identity))
        write_json(folder / ENVIRONMENT, msgspec.to_builtins(environment))
        # Last: a folder with a config is one that can be resumed.
        write_json(folder / CONFIG, configs.to_dict(config))
    except OSError as error:
        raise write_error(folder, error) from error
    return RunFolder(folder)


def require_free(folder: Path) -> None:
    """Raise a UserError if a new run in ``folder`` would mix with other files.

    Files of a run that was killed before it had a config do not count.
    """
    if not exists(folder):
        return
    with reading(folder):
        if not folder.is_dir():
            raise UserError(f"{folder} is a file: choose another --out_dir")
        found = {path.name for path in folder.iterdir()}
    started = {"checkpoints", TOKENIZER_FILE, DATA, ENVIRONMENT}
    names = {name.removeprefix(".").removesuffix(".tmp") for name in found}
    if names - started - {CONFIG} or CONFIG in found:
        raise UserError(
            f"{folder} is not empty: choose another --out_dir, or continue the run in it with "
            f"`storylab resume {folder}`"
        )


def open_run(folder: Path) -> RunFolder:
    """Open the run in ``folder``, reading nothing yet.

    Raises:
        UserError: there is no run, or the folder cannot be read.
    """
    if not exists(folder / CONFIG):
        raise UserError(f"{folder} is not a run folder (it has no {CONFIG}): check the path")
    return RunFolder(folder)
