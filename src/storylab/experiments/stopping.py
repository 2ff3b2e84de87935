"""Train an experiment look by look, and stop the arms that a planned look has settled."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs

from storylab.data.dataset import Dataset
from storylab.execution.job import Executor
from storylab.experiments.effect_words import verdict_lines
from storylab.experiments.experiment import Experiment
from storylab.experiments.factors import qualified_name
from storylab.experiments.outcome import Outcome, load_outcome
from storylab.experiments.plan import PlannedRun
from storylab.experiments.progress import ExperimentReporter
from storylab.experiments.recording import update_record, write_record
from storylab.experiments.records import FolderCache
from storylab.experiments.registration import now, registration_lines
from storylab.experiments.scheduler import run_experiment
from storylab.record.experiment_schema import ExperimentRecord, LookTaken
from storylab.record.run import ENDED

CellKey = tuple[str, str]
"""Condition and arm."""


def run_by_looks(
    experiment: Experiment,
    dataset: Dataset,
    planned: Sequence[PlannedRun],
    runs: Path,
    executor: Executor,
    reporter: ExperimentReporter,
    fresh: bool = False,
) -> tuple[Path, list[str]]:
    """Train the seeds up to a planned look, judge, drop the settled arms, and go on to the next look.

    Args:
        experiment: all of it.
        dataset: prepared data.
        planned: all runs, seed by seed, as if no arm were settled.
        runs: the folder for the run folders.
        executor: carries out the training.
        reporter: shows the progress, and the verdicts of every look before the last.
        fresh: train everything again; earlier runs are set aside.

    Returns:
        The experiment's record, and the state of every run that was wanted.

    Raises:
        Interrupted: a signal stopped it; the same call goes on from there.
    """
    work = _LookByLook(experiment, dataset, planned, runs, executor, reporter, fresh)
    for stop in stops(experiment.looks, len(work.seeds)):
        if not work.train_to(stop):
            break
    return work.record, work.states


@dataclass
class _LookByLook:
    """An experiment that is trained look by look; see :func:`run_by_looks` for the first attributes."""

    experiment: Experiment
    dataset: Dataset
    planned: Sequence[PlannedRun]
    runs: Path
    executor: Executor
    reporter: ExperimentReporter
    fresh: bool
    record: Path = Path()
    """The experiment's record, once it has been written."""
    states: list[str] = field(default_factory=list)
    """Of the runs so far."""
    settled: set[CellKey] = field(default_factory=set)
    done: int = 0
    """Seeds so far."""

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(run.seed for run in self.planned))

    def train_to(self, stop: int) -> bool:
        """Train the open runs up to ``stop`` seeds, and judge; returns False if there are none."""
        seeds, first = self.seeds[self.done : stop], self.done == 0
        part = open_part(self.experiment, self.planned, seeds, self.settled)
        if not part:
            return False
        ended = _ended(part)
        self.record = write_record(
            self.experiment, self.dataset, part, self.runs, self.fresh and first
        )
        if first:
            record = self.planned[0].cache.record(self.record)
            self._report(plan_lines(self.experiment, record, part, len(self.seeds)))
        self.states += run_experiment(part, self.executor, self.reporter, self.fresh)
        self._judge(stop, trained=self.fresh or _ended(part) > ended)
        self.done = stop
        return True

    def _judge(self, stop: int, trained: bool) -> None:
        """Judge at ``stop`` seeds; note the look, if some arm was judged at it, and report its verdicts."""
        cache, looks = self.planned[0].cache, self.experiment.looks
        outcome = judge_look(self.record, cache, looks, stop, self.settled, trained)
        if stop < len(self.seeds) and trained:
            self._report(look_lines(outcome, stop, self.settled))
        self.settled |= outcome.settled_arms()

    def _report(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.reporter.line(line)


def judge_look(
    path: Path,
    cache: FolderCache,
    looks: Sequence[int],
    stop: int,
    settled: Collection[CellKey],
    again: bool,
) -> Outcome:
    """Judge an experiment at ``stop`` seeds, and note the look if some arm was judged at it.

    Args:
        path: file of the record.
        cache: runs and records that have been read.
        looks: numbers of seeds at which verdicts are planned.
        stop: seeds so far.
        settled: the arms that earlier looks have settled.
        again: see :func:`note_look`.
    """
    outcome = load_outcome(path, cache)
    last = max((judgement.look or 0 for judgement in outcome.judgements), default=0)
    if stop in looks and stop <= last:
        note_look(path, cache, stop, outcome.settled_arms() - set(settled), again)
    return outcome


def stops(looks: Sequence[int], seeds: int) -> list[int]:
    """Numbers of seeds after which training pauses: the planned looks below ``seeds``, and ``seeds``."""
    return [*(look for look in looks if look < seeds), seeds]


def plan_lines(
    experiment: Experiment,
    record: ExperimentRecord,
    planned: Sequence[PlannedRun],
    seeds: int,
) -> Iterator[str]:
    """How the plan is registered, and what ``seeds`` seeds mean in it."""
    for line in registration_lines(record):
        yield f"This plan: {line}"
    compared = any(run.cell.arm != experiment.baseline for run in planned)
    unplanned = unplanned_line(experiment.looks, seeds)
    if compared and unplanned:
        yield unplanned


def unplanned_line(looks: Sequence[int], seeds: int) -> str | None:
    """The meaning of a number of seeds that is no planned look; None if it is one."""
    if seeds in looks:
        return None
    before = [look for look in looks if look < seeds]
    if not before:
        return f"No verdict yet with {seeds} seeds: the first planned look is at {looks[0]}"
    return (
        f"{seeds} seeds are no planned look: verdicts stay those of the look at {before[-1]} seeds, and "
        "the seeds after it are exploratory"
    )


def open_part(
    experiment: Experiment,
    planned: Sequence[PlannedRun],
    seeds: Collection[int],
    settled: Collection[CellKey],
) -> list[PlannedRun]:
    """The runs with ``seeds`` that are still needed, in order."""
    return [r for r in planned if r.seed in seeds and is_open(experiment, r, settled, planned)]


def is_open(
    experiment: Experiment,
    run: PlannedRun,
    settled: Collection[CellKey],
    planned: Sequence[PlannedRun],
) -> bool:
    """Whether a run is still needed: its arm is not settled, or it is the baseline of one that is not."""
    condition, arm = run.cell.condition, run.cell.arm
    if arm != experiment.baseline:
        return (condition, arm) not in settled
    cells = {(other.cell.condition, other.cell.arm) for other in planned}
    against = {cell for cell in cells if cell[0] == condition and cell[1] != arm}
    return not against or not against.issubset(settled)


def look_lines(outcome: Outcome, stop: int, settled: Collection[CellKey]) -> Iterator[str]:
    """The verdicts of a look, of the arms that were not ``settled`` before it."""
    yield f"Look at {stop} seeds:"
    for line in verdict_lines(outcome, settled):
        yield f"  {line}"
    names = [qualified_name(arm, condition) for condition, arm in sorted(outcome.settled_arms())]
    if names:
        yield f"Settled, so not trained with more seeds: {', '.join(names)}"


def note_look(
    path: Path, cache: FolderCache, stop: int, settled: Collection[CellKey], again: bool
) -> None:
    """Add a look to a record.

    Args:
        path: file of the record.
        cache: records that have been read.
        stop: seeds at the look.
        settled: the arms that it has settled.
        again: whether to add it even if the record has a look at that number of seeds.
    """

    def change(record: ExperimentRecord) -> dict[str, object]:
        taken = record.looks_taken
        if not again and any(look.seeds == stop for look in taken):
            return {}
        names = [qualified_name(arm, condition) for condition, arm in sorted(settled)]
        look = LookTaken(time=now(), seeds=stop, settled=names)
        return {"looks_taken": [structs.asdict(entry) for entry in (*taken, look)]}

    update_record(path, cache, change)


def _ended(planned: Sequence[PlannedRun]) -> set[Path]:
    return {run.folder for run in planned if run.read_state() in ENDED}
