"""Write the record of an experiment: its plan and its runs, and what was shown of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from storylab.config import from_dict, to_dict
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments.attempts import set_aside
from storylab.experiments.experiment import Cell, Experiment
from storylab.experiments.factors import changed_fields
from storylab.experiments.leases import hold_records
from storylab.experiments.plan import PlannedRun, ResolvedCell, resolved_cells
from storylab.experiments.records import EXPERIMENTS, FolderCache, experiment_records
from storylab.experiments.registered_plan import plan_of
from storylab.experiments.registration import Progress, registered_values
from storylab.files import exists, make_folder, open_file
from storylab.record.experiment_schema import CellRecord, ExperimentRecord
from storylab.record.run import ENDED

# Fields that are filled in by a machine that has a run's device and precision.
RESOLVED_FIELDS = ("device", "data_seed", "backend", "compile")


def record_path(experiment: Experiment, runs: Path) -> Path:
    """The file of an experiment's record in a folder of runs."""
    return runs / EXPERIMENTS / f"{experiment.label}.json"


def write_record(
    experiment: Experiment,
    dataset: Dataset,
    planned: Sequence[PlannedRun],
    runs: Path,
    fresh: bool = False,
) -> Path:
    """Write which runs make up the experiment; comparison and report read it. Returns the file.

    The first call registers the plan, and later ones add what has changed since. Runs that an earlier call
    planned and this one leaves out stay listed while their arm is the same. A damaged record is set aside,
    and the new one says so.

    Args:
        experiment: all of it.
        dataset: prepared data.
        planned: the runs to train.
        runs: the folder for the run folders.
        fresh: whether to train all of them again.

    Raises:
        UserError: an earlier record may be whole but cannot be read, or the file cannot be written.
    """
    path, cache = record_path(experiment, runs), planned[0].cache
    make_folder(path.parent)
    with hold_records(runs) as lease:
        before, damage = _read_or_set_aside(path, cache)
        known = {(cell.condition, cell.arm): cell for cell in before.cells} if before else {}
        found = resolved_cells(experiment, dataset, {run.cell.arm for run in planned})
        cells, listed = _listed_cells(found, known, planned)
        plan = plan_of(experiment, cells, dataset.fingerprint)
        folders = {name for cell in (*known.values(), *listed) for name in cell.runs.values()}
        progress = _progress(path, folders, _pairs(experiment, found), cache)
        values = dataclasses.asdict(experiment)
        del values["data"], values["cells"]
        values["cells"] = [_plain(cell) for cell in listed]
        values |= registered_values(before, plan, progress, damage, fresh)
        lease.renew()
        cache.save_record(path, values)
    return path


def update_record(
    path: Path, cache: FolderCache, change: Callable[[ExperimentRecord], dict[str, Any]]
) -> None:
    """Replace keys of a record.

    Args:
        path: file of the record.
        cache: records that have been read.
        change: returns the keys to replace, as plain JSON values, for the record as it is now.

    Raises:
        UserError: the record cannot be read or written.
    """
    with hold_records(path.parent.parent) as lease:
        if values := change(cache.record(path)):
            lease.renew()
            cache.save_record(path, values)


def _read_or_set_aside(path: Path, cache: FolderCache) -> tuple[ExperimentRecord | None, str]:
    """The record so far, if any, and why an earlier one was set aside.

    Raises:
        UserError: the file cannot be opened, so that it may be whole.
    """
    if not exists(path):
        return None, ""
    try:
        return cache.record(path), ""
    except UserError as error:
        with open_file(path) as file:  # whole, perhaps, if this fails
            file.read()
        why = str(error).removeprefix(f"{path} ").replace(f"{path.parent}/", "")
        return None, f"the earlier one {why}; it was set aside as {set_aside(path).name}"


def _listed_cells(
    found: Sequence[ResolvedCell],
    before: dict[tuple[str, str], CellRecord],
    planned: Sequence[PlannedRun],
) -> tuple[list[Cell], list[CellRecord]]:
    """The cells, and their records with all runs that are or were planned."""
    cells, listed = [], []
    for resolved in found:
        cell = resolved.cell
        key = (cell.condition, cell.arm)
        runs = {}
        if (earlier := before.get(key)) is not None:
            runs = earlier.runs
            if not resolved.runnable and (same := _resolved_before(cell, earlier)):
                cell = same
            else:
                runs = {s: n for s, n in runs.items() if n == resolved.folder_name(int(s))}
        seeds = {run.seed for run in planned if (run.cell.condition, run.cell.arm) == key}
        runs = runs | {str(seed): resolved.folder_name(seed) for seed in seeds}
        cells.append(cell)
        listed.append(
            CellRecord(
                condition=cell.condition,
                arm=cell.arm,
                config=to_dict(cell.config),
                runs={seed: runs[seed] for seed in sorted(runs, key=int)},
            )
        )
    return cells, listed


def _resolved_before(cell: Cell, earlier: CellRecord) -> Cell | None:
    """The cell as a machine that can run it has recorded it; None if the file has changed it since."""
    try:
        recorded = from_dict(earlier.config)
    except UserError:  # of another version
        return None
    filled = {name: getattr(recorded, name) for name in RESOLVED_FIELDS}
    config = dataclasses.replace(cell.config, **filled)
    same = not changed_fields(config, recorded)
    return dataclasses.replace(cell, config=config) if same else None


def _pairs(experiment: Experiment, cells: Sequence[ResolvedCell]) -> list[tuple[str, str]]:
    """The run folders of every arm with those of its baseline, by seed, up to the last look; the
    baseline is paired with itself."""
    seeds = experiment.first_seeds(max(len(experiment.seeds), experiment.looks[-1]))
    baselines = {c.cell.condition: c for c in cells if c.cell.arm == experiment.baseline}
    return [
        (cell.folder_name(seed), baselines[cell.cell.condition].folder_name(seed))
        for cell in cells
        for seed in seeds
    ]


def _progress(
    path: Path, listed: set[str], pairs: Sequence[tuple[str, str]], cache: FolderCache
) -> Progress:
    """How far the runs of an experiment are: those ``listed``, and those of the ``pairs`` of its plan."""
    runs = path.parent.parent
    names = listed.union(*pairs)
    ended = {name for name in names if cache.state(runs / name)[0] in ENDED}
    others: set[str] = set()
    for other in experiment_records(runs):
        if other != path:
            with contextlib.suppress(UserError):  # the report names a damaged one
                cells = cache.record(other).cells
                others |= {name for cell in cells for name in cell.runs.values()}
    known = sum(arm != baseline and {arm, baseline} <= ended for arm, baseline in pairs)
    return Progress(len(ended), len(ended & others), len(listed | ended), known)


def _plain(cell: CellRecord) -> dict[str, Any]:
    return {
        "condition": cell.condition,
        "arm": cell.arm,
        "config": cell.config,
        "runs": cell.runs,
    }
