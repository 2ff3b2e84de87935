"""Experiments that wait for workers: the plan of each from its record, and the runs that it still needs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs

from storylab.config import from_dict
from storylab.data.dataset import Dataset, load_dataset
from storylab.data.prepare import PrepareConfig
from storylab.errors import UserError
from storylab.experiments.experiment import Cell, Expectation, Experiment
from storylab.experiments.factorial import Factorial
from storylab.experiments.factors import qualified_name
from storylab.experiments.leases import claim_judging
from storylab.experiments.plan import PlannedRun, plan_runs
from storylab.experiments.recording import update_record, write_record
from storylab.experiments.records import FolderCache, experiment_records
from storylab.experiments.registered_plan import amended_plan
from storylab.experiments.registration import TIME_FORMAT
from storylab.experiments.stopping import CellKey, judge_look, look_lines, open_part, stops
from storylab.leases import Claimant
from storylab.record.experiment_schema import ExperimentRecord, Queued
from storylab.record.provenance import code_sha256, representative
from storylab.record.run import DAMAGED, ENDED, FAILED, run_state


def enqueue(
    experiment: Experiment, dataset: Dataset, planned: Sequence[PlannedRun], runs: Path
) -> Path:
    """Register an experiment for workers and train nothing; returns its record.

    Args:
        experiment: all of it.
        dataset: prepared data.
        planned: the runs to train, seed by seed, as if no arm were settled.
        runs: the folder for the run folders.

    Raises:
        UserError: the record cannot be read or written.
    """
    seeds = list(dict.fromkeys(run.seed for run in planned))
    arms = [arm for arm in experiment.arms if any(run.cell.arm == arm for run in planned)]
    queued = Queued(time=time.strftime(TIME_FORMAT), seeds=seeds, arms=arms)
    first = seeds[: stops(experiment.looks, len(seeds))[0]]
    path = write_record(experiment, dataset, [r for r in planned if r.seed in first], runs)
    values = {"queued": structs.asdict(queued)}
    update_record(path, planned[0].cache, lambda _: values)
    return path


def queued_records(runs: Path, cache: FolderCache) -> list[tuple[Path, ExperimentRecord]]:
    """The records of experiments that wait for workers, the one that was registered first in front.

    Raises:
        UserError: the folder cannot be read.
    """
    found = []
    for path in experiment_records(runs):
        with contextlib.suppress(UserError):  # the report names a damaged one
            record = cache.record(path)
            if record.queued is not None:
                found.append((record.queued.time, path, record))
    return [(path, record) for _, path, record in sorted(found, key=lambda item: item[:2])]


def recorded_experiment(record: ExperimentRecord) -> Experiment:
    """The experiment of a record, with the configs that its first machine resolved.

    Raises:
        UserError: a config is of another version.
    """
    cells = tuple(Cell(c.condition, c.arm, from_dict(c.config)) for c in record.cells)
    return Experiment(
        name=record.name,
        file=record.file,
        scale=record.scale,
        title=record.title,
        purpose=record.purpose,
        hypothesis=record.hypothesis,
        note=record.note,
        waits_for=record.waits_for,
        factor=record.factor,
        baseline=record.baseline,
        arms=tuple(record.arms),
        conditions=tuple(record.conditions),
        matched=tuple(record.matched),
        seeds=tuple(record.seeds),
        looks=tuple(record.looks),
        variance=record.variance,
        stage=record.stage,
        margin=record.margin,
        expectations=tuple(Expectation(**structs.asdict(e)) for e in record.expectations),
        data=PrepareConfig(),  # the data is prepared, and its fingerprint is in the plan
        cells=cells,
        factorial=Factorial.of(record.factorial) if record.factorial else None,
    )


def find_data(record: ExperimentRecord, folders: Iterable[Path]) -> Dataset:
    """The data set of a plan: where the plan was registered, or in one of ``folders``.

    Raises:
        UserError: none of them has the content that the plan names.
    """
    assert record.registered is not None
    wanted = amended_plan(record.registered, record.amendments)["data"]
    places = dict.fromkeys([*folders, *(Path(c.config["data_dir"]) for c in record.cells)])
    for place in places:
        try:
            dataset = load_dataset(place)
        except UserError:
            continue
        if dataset.fingerprint == wanted:
            return dataset
    raise UserError(
        f"its data (fingerprint {wanted[:12]}) is not in {', '.join(map(str, places))}: give its folder "
        "as --data_dir"
    )


@dataclass
class QueuedExperiment:
    """An experiment that workers train, look by look; see :func:`open_queued`."""

    record: Path
    experiment: Experiment
    dataset: Dataset
    planned: Sequence[PlannedRun]
    runs: Path
    cache: FolderCache
    retry: bool = False
    """Whether runs that failed are trained again, once by each worker."""
    part: list[PlannedRun] = field(default_factory=list)
    """The runs of the current look; empty if none is needed any more."""
    settled: set[CellKey] = field(default_factory=set)
    done: int = 0
    """Seeds of the looks before the current one."""
    _closed: set[Path] = field(default_factory=set)
    _damaged: set[Path] = field(default_factory=set)

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order."""
        return list(dict.fromkeys(run.seed for run in self.planned))

    @property
    def stop(self) -> int:
        """Number of seeds at the current look."""
        return next(s for s in stops(self.experiment.looks, len(self.seeds)) if s > self.done)

    def open_runs(self) -> Iterator[PlannedRun]:
        """Runs of the current look that have no result yet, in order.

        Of a run that has ended this reads the summary alone; who judges the look reads all of it.
        """
        kept = ENDED if self.retry else (*ENDED, FAILED)
        for run in self.part:
            if run.folder in self._closed:
                continue
            if run.folder not in self._damaged and run_state(run.folder)[0] in kept:
                self.close(run)
            else:
                yield run

    def close(self, run: PlannedRun) -> None:
        """This process need not look at a run again: it has a result, or cannot have one here."""
        self._closed.add(run.folder)

    def begin_look(self) -> None:
        """Find the runs of the current look, and write them into the record.

        Raises:
            UserError: the record cannot be read or written.
        """
        self.part = []
        if self.done == len(self.seeds):
            return
        seeds = self.seeds[self.done : self.stop]
        self.part = open_part(self.experiment, self.planned, seeds, self.settled)
        listed = {n for cell in self.cache.record(self.record).cells for n in cell.runs.values()}
        if any(run.folder.name not in listed for run in self.part):
            write_record(self.experiment, self.dataset, self.part, self.runs)

    def end_look(self, claimant: Claimant) -> list[str] | None:
        """Judge the current look, all runs of which have a result, and begin the next one.

        One worker judges, and the others read in the record which arms are settled.

        Returns:
            Lines for the user; None while another worker judges. If a run turns out to be damaged, the look
            goes on with that.

        Raises:
            UserError: the record cannot be read or written.
        """
        lines: list[str] = []
        if not self._settle_as_recorded():
            with claim_judging(claimant, self.record) as lease:
                if lease is None:
                    return None
                if not self._settle_as_recorded():
                    if self._reopened():
                        return []
                    lines = self._judge()
        self.done = self.stop
        self.begin_look()
        return lines

    def _reopened(self) -> bool:
        """Open the damaged runs of the look again, each once; returns whether there were any."""
        found = {run.folder for run in self.part if run.read_state() == DAMAGED} - self._damaged
        self._damaged |= found
        self._closed -= found
        return bool(found)

    def _judge(self) -> list[str]:
        looks = self.experiment.looks
        outcome = judge_look(self.record, self.cache, looks, self.stop, self.settled, again=False)
        lines = []
        if (
            self.experiment.stage == "search"
        ):  # a confirmation shows its verdicts once, and notes it
            lines = list(look_lines(outcome, self.stop, self.settled))
        self.settled |= outcome.settled_arms()
        return lines

    def _settle_as_recorded(self) -> bool:
        """Note the arms that the current look has settled by the record; False if it has no such look."""
        record = self.cache.record(self.record)
        looks = [look for look in record.looks_taken if look.seeds == self.stop]
        names = {name for look in looks for name in look.settled}
        cells = [(cell.condition, cell.arm) for cell in record.cells]
        self.settled |= {cell for cell in cells if qualified_name(cell[1], cell[0]) in names}
        return bool(looks)


def open_queued(
    path: Path, cache: FolderCache, folders: Iterable[Path] = (), retry: bool = False
) -> QueuedExperiment:
    """The experiment of a queued record, as far as this machine can train it.

    Args:
        path: file of the record.
        cache: runs and records that have been read.
        folders: of data sets, besides the folder that the record names.
        retry: whether runs that failed are trained again.

    Raises:
        UserError: the code here gives other numbers than that of the plan, the data is not here, or the
            machine lacks a device or precision.
    """
    record, runs = cache.record(path), path.parent.parent
    assert record.registered is not None and record.queued is not None
    planned_code = amended_plan(record.registered, record.amendments)["code"]
    if representative(planned_code) != representative(code_sha256()):
        raise UserError(
            f"its plan was registered with code {planned_code[:8]}, and here is {code_sha256()[:8]}, whose "
            "numbers may differ: install the same version, or register it again"
        )
    dataset, experiment = find_data(record, folders), recorded_experiment(record)
    queued = record.queued
    planned = plan_runs(experiment, dataset, runs, queued.seeds, queued.arms, cache)
    known = {(c.condition, c.arm, s): n for c in record.cells for s, n in c.runs.items()}
    for run in planned:
        name = known.get((run.cell.condition, run.cell.arm, str(run.seed)), run.folder.name)
        if name != run.folder.name:
            raise UserError(f"{run.label} is {run.folder.name} here and {name} in its record")
    found = QueuedExperiment(path, experiment, dataset, planned, runs, cache, retry)
    found.begin_look()
    return found
