"""Runs at a glance: what `storylab list` and `storylab watch` show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from storylab.errors import UserError
from storylab.experiments.outcome import experiment_records, read_experiment
from storylab.experiments.results import ENDED, load_result, run_folders, run_state
from storylab.files import exists, held, open_file, reading
from storylab.training.lines import duration
from storylab.training.run_folder import METRICS, Run, parse_row

WATCH_COLUMNS = ("run", "state", "iteration ", "loss ", "val loss ", "tok/s now ", "left ")
# Enough of the end of a metrics file to hold its last rows.
TAIL_BYTES = 16_384


@dataclass(frozen=True)
class ListRow:
    """One run folder; None for what is not known."""

    name: str
    state: str
    parameters: int | None
    tokens: int | None
    loss: float | None
    speed: float | None
    memory: int | None
    started: str
    fault: str = ""
    """What is wrong with a damaged one."""

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        return (
            self.name,
            self.state,
            "" if self.parameters is None else f"{self.parameters:,}",
            "" if self.tokens is None else f"{self.tokens:,}",
            "" if self.loss is None else f"{self.loss:.4f}",
            "" if self.speed is None else f"{self.speed:,.0f}",
            "" if self.memory is None else f"{self.memory / 1e9:.2f}",
            self.started[:16].replace("T", " "),
        )


def list_rows(runs: Path) -> Iterator[ListRow]:
    """Every run folder in ``runs``, a damaged one with what is wrong with it.

    Raises:
        UserError: ``runs`` cannot be read.
    """
    for folder in run_folders(runs):
        yield _list_row(folder)


def _list_row(folder: Path) -> ListRow:
    state, reason = run_state(folder)
    if state == "failed":
        return ListRow(folder.name, state, None, None, None, None, None, "")
    try:
        result = load_result(folder)
    except UserError as error:
        fault = reason if state == "damaged" else str(error)
        return ListRow(folder.name, "damaged", None, None, None, None, None, "", fault)
    ended = state in ENDED
    return ListRow(
        folder.name,
        state,
        result.summary.get("parameters"),
        result.summary.get("tokens"),
        result.loss if result.finished else None,
        result.speed if ended else None,
        result.summary.get("peak_memory_bytes"),
        result.environment["started"],
    )


@dataclass(frozen=True)
class WatchTable:
    """How far an experiment is: a row for every run, and what is damaged."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    faults: tuple[str, ...]


def watch_tables(runs: Path) -> Iterator[WatchTable]:
    """A table for every experiment.

    Raises:
        UserError: there are no experiments, or ``runs`` cannot be read.
    """
    records = experiment_records(runs)
    if not records:
        raise UserError(
            f"{runs} has no experiments yet: `storylab list --runs {runs}` shows its runs"
        )
    for path in records:
        try:
            record = read_experiment(path)
        except UserError as error:
            yield WatchTable(f"{path.stem}: its record is damaged", (), (str(error),))
            continue
        found = [
            _watch_row(runs / name, f"{cell['arm']} {cell['condition']} s{seed}".replace("  ", " "))
            for cell in record["cells"]
            for seed, name in cell["runs"].items()
        ]
        rows = tuple(row for row, _ in found)
        done = sum(row[1] not in ("waiting", "training", "stopped") for row in rows)
        yield WatchTable(
            f"{path.stem}: {record['title']}, {done} of {len(rows)} runs done",
            rows,
            tuple(fault for _, fault in found if fault),
        )


def _watch_row(folder: Path, label: str) -> tuple[tuple[str, ...], str]:
    """A run's row, and what is wrong with a damaged one."""
    try:
        state, reason = run_state(folder)
        if state == "damaged":
            raise UserError(reason)
        if state in ENDED and (fault := _fault(folder, _stamps(folder))):
            raise UserError(fault)
        return _known_row(folder, label, state), ""
    except UserError as error:
        return (label, "damaged", "", "", "", "", ""), str(error)


def _stamps(folder: Path) -> tuple[int, ...]:
    """When the files in a folder were changed last."""
    with reading(folder):
        return tuple(path.lstat().st_mtime_ns for path in sorted(folder.iterdir()))


@cache
def _fault(folder: Path, stamps: tuple[int, ...]) -> str:
    """What is wrong with a run that has ended; read once for as long as its files stay as they are."""
    try:
        load_result(folder)
    except UserError as error:
        return str(error)
    return ""


def _known_row(folder: Path, label: str, state: str) -> tuple[str, ...]:
    if state == "new":
        return (label, "waiting", "", "", "", "", "")
    run = Run(folder)
    if state == "unfinished":
        _ = run.data, run.environment
        state = "training" if held(folder) else "stopped"
    last, evaluation = _last_rows(folder / METRICS)
    if state == "failed" or not last:
        return (label, state, "", "", "", "", "")
    total = run.config.max_iters
    left = (total - last["iteration"]) * last["step_seconds"]
    full = run.summary["validation"] if run.summary else None
    val_loss = full["loss"] if full else evaluation.get("val_loss")
    return (
        label,
        state,
        f"{last['iteration']:,}/{total:,}",
        f"{last['loss']:.4f}",
        "" if val_loss is None else f"{val_loss:.4f}",
        f"{last['tokens_per_second']:,.0f}",
        duration(left) if state == "training" else "",
    )


def _last_rows(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last whole iteration and evaluation rows of a metrics file that may be growing."""
    found: dict[str, dict[str, Any]] = {}
    if exists(path):
        with open_file(path) as file:
            start = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
            file.seek(start)
            # What the tail begins with is part of a row, and what it ends with may be.
            lines = file.read().split(b"\n")[bool(start) : -1]
        for line in lines:
            row = parse_row(line, str(path))
            found[row["kind"]] = row
    return found.get("iteration", {}), found.get("evaluation", {})
