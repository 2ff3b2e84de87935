"""Find and read the records of experiments in a folder of runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import structs

from storylab.config import current_name
from storylab.errors import UserError
from storylab.experiments.experiment import METRICS
from storylab.experiments.factorial import design_faults
from storylab.experiments.factors import qualified_name
from storylab.experiments.plan import EXPERIMENTS
from storylab.files import exists, read_record, reading
from storylab.record.experiment_schema import ExperimentRecord


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
    record = read_record(path, ExperimentRecord)
    if fault := next(_record_faults(record), None):
        raise UserError(f"{path} is damaged: {fault}")
    return _with_current_factors(record)


def _with_current_factors(record: ExperimentRecord) -> ExperimentRecord:
    design = record.factorial
    if design is not None:
        factors = [
            structs.replace(factor, fields=sorted(map(current_name, factor.fields)))
            for factor in design.factors
        ]
        design = structs.replace(design, factors=factors)
    return structs.replace(record, factor=current_name(record.factor), factorial=design)


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
