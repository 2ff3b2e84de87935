"""The run folder: everything about one run, and the only source of truth about it.

``config.json``, ``data.json``, ``environment.json`` and ``tokenizer.tiktoken`` are written once at
the start, ``log.txt`` and ``metrics.jsonl`` grow a line at a time, ``checkpoints/`` and
``summary.json`` are replaced whole. docs/guide/run-folder.md describes each.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from storylab import __version__
from storylab import config as configs
from storylab.checked import check
from storylab.config import TrainConfig
from storylab.data.dataset import TOKENIZER_FILE, Dataset, load_dataset
from storylab.data.tokenizer import Tokenizer, load_tokenizer
from storylab.errors import UserError
from storylab.files import (
    atomic_path,
    exists,
    open_file,
    parse_json,
    read_json,
    read_record,
    reading,
    sha256_file,
    write_error,
    write_json,
)
from storylab.record import (
    ROWS,
    DataRecord,
    EnvironmentRecord,
    FinishedRecord,
    RowKind,
    SummaryRecord,
)

CONFIG, DATA, ENVIRONMENT, SUMMARY = "config.json", "data.json", "environment.json", "summary.json"
METRICS, LOG, PRECISION = "metrics.jsonl", "log.txt", "precision.json"
STORY_LOSSES, POSITION_LOSSES = "story_losses.npy", "position_losses.npy"
# No loss of a story or a position comes near it.
LARGEST_LOSS = 1e40
TABLE_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f8', 'fortran_order': False, "
    rb"'shape': \((\d{1,15}),(?: (\d{1,15}))?\), \} *\n",
    re.DOTALL,
)
# What decides the numbers of a run; a change elsewhere (pages, say) makes no other version of it.
NUMERIC_CODE = ("config", "optim", "data", "model", "precision", "training")
# What only tells of a run or times steps of none.
BESIDE_NUMBERS = ("training/lines.py", "training/measure.py", "training/telemetry.py")
PACKAGES = ("torch", "numpy", "safetensors", "tiktoken", "tokenizers", "pyarrow")


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def config(self) -> TrainConfig:
        """The resolved config that the run was started with."""
        path = self.folder / CONFIG
        values = read_json(path)
        try:
            return configs.from_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @property
    def data(self) -> DataRecord:
        """Fingerprint, vocabulary and sizes of the data set."""
        return read_record(self.folder / DATA, DataRecord)

    @property
    def environment(self) -> EnvironmentRecord:
        """Code version, packages, device, threads, and the hashes that prove what was shared."""
        return read_record(self.folder / ENVIRONMENT, EnvironmentRecord)

    @property
    def summary(self) -> SummaryRecord | None:
        """Results, or None while the run has not stopped yet."""
        path = self.folder / SUMMARY
        if not exists(path):
            return None
        summary = read_record(path, SummaryRecord)
        if summary["status"] == "finished":
            check(FinishedRecord, summary, str(path))
            if not summary["samples"]:
                raise UserError(f"{path} is damaged: samples is empty")
        return summary

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run's data."""
        path, expected = self.folder / TOKENIZER_FILE, self.data["tokenizer"]
        if not exists(path) or sha256_file(path) != expected["sha256"]:
            raise UserError(f"{path} is missing or altered: copy it again from the run's data set")
        return load_tokenizer(path, expected["name"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``; a last line that a kill has cut short is left out."""
        return list(self._metric_rows())

    def load_data(self, folder: Path) -> Dataset:
        """The data set in ``folder``, which must be the run's.

        Raises:
            UserError: it cannot be used, or has another content.
        """
        dataset, expected = load_dataset(folder), self.data["fingerprint"]
        if dataset.fingerprint != expected:
            raise UserError(
                f"{folder} is not the data of this run: its fingerprint is "
                f"{dataset.fingerprint[:12]}, the run's {expected[:12]}; give the right --data_dir"
            )
        return dataset

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint ``best`` or ``last``."""
        return self.folder / "checkpoints" / f"{name}.safetensors"

    def _metric_rows(self) -> Iterator[dict[str, Any]]:
        path = self.folder / METRICS
        if not exists(path):
            return
        with open_file(path) as file:
            lines = file.read().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                yield parse_row(line, f"{path} line {number}")
            except UserError:
                if number < len(lines):
                    raise

    def continue_from(
        self, next_iteration: int, config: TrainConfig, compile_record: dict[str, Any]
    ) -> None:
        """Prepare to be resumed: what comes from ``next_iteration`` on is dropped and made again."""
        rows, found = [], 0
        # What follows may be the remains of a power cut, and is not read.
        for row in self._metric_rows() if next_iteration else ():
            if row["iteration"] < next_iteration:
                rows.append(row)
                found += row["kind"] == "iteration"
            if found == next_iteration:
                break
        if found != next_iteration:
            raise UserError(
                f"{self.folder / METRICS} has {found} of the {next_iteration} iterations that the "
                "checkpoint has done: restore it from a copy"
            )
        with atomic_path(self.folder / METRICS) as temporary:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            temporary.write_text(text, encoding="utf-8")
        for stale in (SUMMARY, STORY_LOSSES, POSITION_LOSSES):
            (self.folder / stale).unlink(missing_ok=True)
        record = self.environment
        again = environment() | {"iteration": next_iteration} | compile_record
        resumed = [*record.get("resumed", []), again]
        write_json(self.folder / ENVIRONMENT, record | {"resumed": resumed})
        write_json(self.folder / CONFIG, configs.to_dict(config))

    def sync_metrics(self) -> None:
        """Make the metrics so far survive a power cut; a checkpoint must not be ahead of them."""
        if (self.folder / METRICS).exists():
            with open(self.folder / METRICS, "rb+") as file:
                os.fsync(file.fileno())

    def append(self, file: str, line: str) -> None:
        """Add a line to ``log.txt`` or ``metrics.jsonl``; it is out of this process at once."""
        try:
            with open(
                self.folder / file, "a", encoding="utf-8", errors="replace", newline="\n"
            ) as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise write_error(self.folder / file, error) from error

    def write_table(self, name: str, table: np.ndarray) -> None:
        """Replace ``story_losses.npy``, nats and predicted tokens of every validation story, or
        ``position_losses.npy``, mean nats of the targets at each position of a window."""
        with atomic_path(self.folder / name) as temporary, open(temporary, "wb") as file:
            np.save(file, table, allow_pickle=False)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace ``summary.json``."""
        write_json(self.folder / SUMMARY, summary)


def create_run(config: TrainConfig, dataset: Dataset, identity: dict[str, Any]) -> Run:
    """Make the folder ``config.out_dir`` and write what is known before the first iteration.

    Raises:
        UserError: the folder has something in it already, or cannot be written.
    """
    assert config.out_dir is not None
    folder = config.out_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_free(folder)
        (folder / "checkpoints").mkdir(exist_ok=True)
        dataset.tokenizer.save(folder / TOKENIZER_FILE)
        run = Run(folder)
        keys = ("fingerprint", "tokenizer", "dtype", "request")
        data = {key: dataset.manifest.get(key) for key in keys}
        data["tokens"] = {name: len(split) for name, split in dataset.splits.items()}
        write_json(folder / DATA, data)
        write_json(folder / ENVIRONMENT, environment() | identity)
        # Last: a folder with a config is one that can be resumed.
        write_json(folder / CONFIG, configs.to_dict(config))
    except OSError as error:
        raise write_error(folder, error) from error
    return run


def require_free(folder: Path) -> None:
    """Raise a UserError if a new run in ``folder`` would mix with what is there.

    What a run killed in its first moment has left, before it had a config, does not count.
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


def open_run(folder: Path) -> Run:
    """The run in ``folder``.

    Raises:
        UserError: there is no run, or the folder cannot be read.
    """
    if not exists(folder / CONFIG):
        raise UserError(f"{folder} is not a run folder (it has no {CONFIG}): check the path")
    return Run(folder)


def parse_row(line: bytes, place: str) -> dict[str, Any]:
    """A row of ``metrics.jsonl``.

    Raises:
        UserError: it is cut short, or something in it is missing or of another type.
    """
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{place} is not valid JSON ({error}): it has been altered") from error
    kind = row.get("kind") if isinstance(row, dict) else None
    return check(ROWS.get(kind, RowKind) if isinstance(kind, str) else RowKind, row, place)


def read_table(path: Path, dimensions: int) -> np.ndarray:
    """Read finite float64 numbers from a ``.npy`` file of one or two dimensions.

    By the header that :meth:`Run.write_table` leaves: numpy's own reader takes what is there for an
    expression of Python, and for any amount of memory.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    with open_file(path) as file:
        data = file.read()
    header = TABLE_HEADER.match(data)
    shape = [int(size) for size in header.groups() if size] if header else []
    values = data[header.end() :] if header else b""
    if len(shape) != dimensions or len(values) != 8 * math.prod(shape):
        raise UserError(
            f"{path} is damaged: it is no whole table of float64 of {dimensions} dimensions"
        )
    table = np.frombuffer(values, "<f8").reshape(shape).astype(np.float64)
    if not np.isfinite(table).all() or (table.size and np.abs(table).max() > LARGEST_LOSS):
        raise UserError(f"{path} is damaged: it has numbers that are not finite, or far too large")
    return table


def environment() -> dict[str, Any]:
    """Code version, packages and machine, as JSON values."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "storylab": __version__,
        "code_sha256": code_sha256(),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": cuda_versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # with the build, which the package's metadata may not name
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_versions() -> dict[str, Any] | None:
    """Versions of what computes on a CUDA device, and its memory in bytes; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return {
        "runtime": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "driver": _driver(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        version = str(pynvml.nvmlSystemGetDriverVersion())
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return version


def _processor() -> str:
    """Name of the CPU; the kernel knows it where it is Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def code_sha256() -> str:
    """SHA-256 over the source that decides a run's numbers: the code version without git.

    Comments, docstrings and blank lines do not count.
    """
    root = Path(configs.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] in NUMERIC_CODE and name.as_posix() not in BESIDE_NUMBERS:
            source = bare_source(path.read_text(encoding="utf-8"))
            digest.update(name.as_posix().encode() + b"\0" + source.encode())
    return digest.hexdigest()


def bare_source(source: str) -> str:
    """``source`` without comments, docstrings and blank lines, the same under every Python: the text
    itself, as what ``ast.unparse`` makes of it differs between versions."""
    lines = source.splitlines()
    # From the last to the first, so that what is cut moves nothing that is still to be cut.
    for first, start, last, end in sorted(_unread(source), reverse=True):
        tail = lines[last][end:]
        lines[first : last + 1] = [lines[first][:start] + tail]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _unread(source: str) -> Iterator[tuple[int, int, int, int]]:
    """Where comments and docstrings are: line and column, from 0, of begin and end."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0] - 1, token.start[1], token.end[0] - 1, token.end[1]
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            # Columns of the syntax tree count bytes, those of the text characters.
            last = (node.end_lineno or node.lineno) - 1
            begin = len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
            end = len(lines[last].encode()[: node.end_col_offset].decode())
            yield node.lineno - 1, begin, last, end


def _git_commit() -> str | None:
    """Commit of the checkout that the package runs from, with "-dirty" if it has changes."""
    if "site-packages" in Path(__file__).parts:
        return None  # an installed copy; a repository around it would be someone else's
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            encoding="utf-8",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
