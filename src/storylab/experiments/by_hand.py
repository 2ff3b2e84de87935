"""Compare runs that somebody has chosen: by the registered plan they belong to, or as exploration."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from storylab.errors import UserError
from storylab.experiments.compare import compare_runs, group_runs
from storylab.experiments.comparison import Arm, Comparison
from storylab.experiments.effects import EffectResult, verdicts_of
from storylab.experiments.factors import qualified_name
from storylab.experiments.neighbors import Neighbors, find_neighbors
from storylab.experiments.outcome import load_outcome
from storylab.experiments.records import FolderCache, experiment_records
from storylab.files import exists
from storylab.record.experiment_schema import ExperimentRecord
from storylab.record.folder import CONFIG
from storylab.record.run import Run

NO_PLAN = "no plan was registered"


@dataclass(frozen=True)
class GivenRuns:
    """Given runs, compared.

    Attributes:
        comparisons: one for every arm but the baseline.
        effects: those of a factorial experiment, which are its verdicts.
        experiment: name of the experiment whose plan judged them; empty without one.
        neighbors: for every arm, runs of its recipe that were not given.
        problems: runs of the experiment that are missing or damaged.
    """

    comparisons: tuple[Comparison, ...]
    effects: tuple[EffectResult, ...] = ()
    experiment: str = ""
    neighbors: tuple[Neighbors, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def verdicts(self) -> list[str]:
        """See :func:`storylab.experiments.effects.verdicts_of`."""
        return verdicts_of(self.comparisons, self.effects)


def compare_given(runs: Sequence[Run], margin: float | None, cache: FolderCache) -> GivenRuns:
    """Compare runs with those of the first run's recipe.

    All runs of one registered experiment are judged by its plan, if the first is of its baseline and the
    margin is its own. Any other choice of runs is exploratory.

    Args:
        runs: one or more.
        margin: the largest difference in nats that counts as none; None for the experiment's, or none.
        cache: runs and records that have been read already.
    """
    reasons = [NO_PLAN]
    for path, record in _experiments_of(runs, cache):
        reasons = list(_departures(record, path.stem, runs[0], margin))
        if not reasons:
            outcome = load_outcome(path, cache)
            arms = [Arm(cell.name, cell.arm.runs) for cell in outcome.cells if cell.arm.runs]
            near = find_neighbors(arms, cache)
            noted = tuple(_noted(comparison, near) for comparison in outcome.comparisons)
            return GivenRuns(noted, outcome.effects, outcome.label, tuple(near), outcome.problems)
    near = find_neighbors(group_runs(runs), cache)
    compared = (_noted(comparison, near) for comparison in compare_runs(runs, margin, cache))
    explored = tuple(_explored(comparison, reasons, near) for comparison in compared)
    return GivenRuns(explored, neighbors=tuple(near))


def _experiments_of(
    runs: Sequence[Run], cache: FolderCache
) -> Iterator[tuple[Path, ExperimentRecord]]:
    """Registered experiments, in the folder of the runs, that have exactly these runs."""
    parents = {os.path.realpath(run.folder.parent): run.folder.parent for run in runs}
    if len(parents) > 1:
        return
    (parent,) = parents.values()
    given = {os.path.realpath(run.folder) for run in runs}
    for path in experiment_records(parent):
        with contextlib.suppress(UserError):  # a damaged record is no plan; the report names it
            record = cache.record(path)
            names = {name for cell in record.cells for name in cell.runs.values()}
            listed = {os.path.realpath(parent / n) for n in names if exists(parent / n / CONFIG)}
            if record.registered is not None and listed == given:
                yield path, record


def _departures(
    record: ExperimentRecord, name: str, first: Run, margin: float | None
) -> Iterator[str]:
    """How a comparison of all runs of an experiment differs from the registered one."""
    baselines = {
        run for cell in record.cells if cell.arm == record.baseline for run in cell.runs.values()
    }
    if Path(os.path.realpath(first.folder)).name not in baselines:
        yield f"{name} was registered with another baseline"
    if margin is not None and margin != record.margin:
        yield f"{name} was registered with another margin"
    if record.stage == "confirm":
        yield f"{name} is judged on the test split, which is opened by `storylab experiment confirm` alone"


def _noted(comparison: Comparison, neighbors: Sequence[Neighbors]) -> Comparison:
    """The comparison with notes on the runs that were not given."""
    lines = (line for near in _of_both(comparison, neighbors) for line in near.lines)
    return dataclasses.replace(comparison, notes=(*comparison.notes, *lines))


def _explored(
    comparison: Comparison, reasons: Sequence[str], neighbors: Sequence[Neighbors]
) -> Comparison:
    """The comparison, marked as exploratory."""
    chosen = (near.reason for near in _of_both(comparison, neighbors))
    return dataclasses.replace(
        comparison, exploratory=(*reasons, *(reason for reason in chosen if reason))
    )


def _of_both(comparison: Comparison, neighbors: Sequence[Neighbors]) -> list[Neighbors]:
    """Those of the arm and of the baseline."""
    names = {
        qualified_name(side, comparison.condition) for side in (comparison.arm, comparison.baseline)
    }
    return [near for near in neighbors if near.arm in names]
