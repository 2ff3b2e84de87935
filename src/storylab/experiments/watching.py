"""The progress of experiments, for `storylab watch`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from storylab.errors import UserError
from storylab.experiments.cost import cost_words
from storylab.experiments.leases import trainer_of
from storylab.experiments.records import FolderCache, experiment_records
from storylab.files import exists, open_file
from storylab.locks import held
from storylab.record.folder import METRICS, RunFolder, parse_row
from storylab.record.index import RunCache
from storylab.record.run import DAMAGED, ENDED, FAILED, NEW, UNFINISHED, Run, run_state
from storylab.record.schema import EvaluationRow, IterationRow
from storylab.training.log_format import format_duration

WATCH_COLUMNS = ("run", "state", "iteration ", "loss ", "val loss ", "tok/s now ", "left ")
DONE = (*ENDED, FAILED, DAMAGED)
# Enough of the end of a metrics file to hold its last rows.
TAIL_BYTES = 16_384


@dataclass(frozen=True)
class WatchTable:
    """Progress of an experiment: a row for every run, and the faults of damaged ones."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    faults: tuple[str, ...]


def watch_tables(runs: Path, cache: FolderCache | None = None) -> Iterator[WatchTable]:
    """Yield a table for every experiment.

    Args:
        runs: the folder of runs.
        cache: runs and records that an earlier call has read.

    Raises:
        UserError: there are no experiments, or ``runs`` cannot be read.
    """
    records, cache = experiment_records(runs), cache or FolderCache()
    if not records:
        raise UserError(
            f"{runs} has no experiments yet: `storylab list --runs {runs}` shows its runs"
        )
    for path in records:
        try:
            record = cache.record(path)
        except UserError as error:
            yield WatchTable(f"{path.stem}: its record is damaged", (), (str(error),))
            continue
        found = [
            _watch_row(
                runs / name, f"{cell.arm} {cell.condition} s{seed}".replace("  ", " "), cache
            )
            for cell in record.cells
            for seed, name in cell.runs.items()
        ]
        rows = tuple(row for row, _ in found)
        done = sum(row[1] in DONE for row in rows)
        names = {name for cell in record.cells for name in cell.runs.values()}
        cost = cost_words(_ended_runs([runs / name for name in sorted(names)], cache))
        yield WatchTable(
            f"{path.stem}: {record.title}, {done} of {len(rows)} runs done"
            + (f", {cost} so far" if cost else ""),
            rows,
            tuple(fault for _, fault in found if fault),
        )


def _ended_runs(folders: Sequence[Path], cache: RunCache) -> list[Run]:
    """The runs that have ended and can be read."""
    found = []
    for folder in folders:
        with contextlib.suppress(UserError):
            if run_state(folder)[0] in ENDED:
                found.append(cache.load(folder))
    return found


def _watch_row(folder: Path, label: str, cache: RunCache) -> tuple[tuple[str, ...], str]:
    """A run's row, and the fault of a damaged one."""
    try:
        state, reason = run_state(folder)
        if state == DAMAGED:
            raise UserError(reason)
        if state in ENDED:
            cache.load(folder)
        return _known_row(folder, label, state, cache), ""
    except UserError as error:
        return (label, DAMAGED, "", "", "", "", ""), str(error)


def _known_row(folder: Path, label: str, state: str, cache: RunCache) -> tuple[str, ...]:
    if state == NEW:
        return (label, _under_way(folder) or "waiting", "", "", "", "", "")
    run, full = RunFolder(folder), None
    if state == UNFINISHED:
        run.read_data()
        run.read_environment()
        state = "training" if held(folder) else _under_way(folder) or "stopped"
    if state in ENDED:
        full = cache.load(folder).results.validation
    last, evaluation = _last_rows(folder / METRICS)
    if state == FAILED or last is None:
        return (label, state, "", "", "", "", "")
    total = run.read_config().max_iters
    left = (total - last.iteration) * last.step_seconds
    val_loss = full.loss if full else evaluation.val_loss if evaluation else None
    return (
        label,
        state,
        f"{last.iteration:,}/{total:,}",
        "skipped" if last.loss is None else f"{last.loss:.4f}",
        "" if val_loss is None else f"{val_loss:.4f}",
        f"{last.tokens_per_second:,.0f}",
        "" if state in (*DONE, "stopped") else format_duration(left),
    )


def _under_way(folder: Path) -> str:
    """``on HOST`` for a run that a process of another machine, or one that is about to start, has taken."""
    holder = trainer_of(folder)
    return f"on {holder.host}" if holder is not None else ""


def _last_rows(path: Path) -> tuple[IterationRow | None, EvaluationRow | None]:
    """The last whole iteration and evaluation rows of a metrics file that may be growing."""
    iteration, evaluation = None, None
    if exists(path):
        with open_file(path) as file:
            start = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
            file.seek(start)
            # The tail begins with part of a row, and may end with one.
            lines = file.read().split(b"\n")[bool(start) : -1]
        for line in lines:
            row = parse_row(line, str(path))
            if isinstance(row, IterationRow):
                iteration = row
            elif isinstance(row, EvaluationRow):
                evaluation = row
    return iteration, evaluation
