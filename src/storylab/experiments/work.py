"""A worker: trains runs of registered experiments, together with any number of workers on any machines."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from storylab.errors import Interrupted, UserError
from storylab.execution.job import Executor
from storylab.experiments.machines import SeedClasses
from storylab.experiments.plan import PlannedRun
from storylab.experiments.progress import ExperimentReporter
from storylab.experiments.queue import QueuedExperiment, open_queued, queued_records
from storylab.experiments.records import FolderCache
from storylab.experiments.scheduler import train_if_free
from storylab.leases import Claimant
from storylab.record.experiment_schema import ExperimentRecord
from storylab.record.run import ENDED, FAILED
from storylab.training.signals import stop_signals

POLL_SECONDS = 2.0
# So many runs that fail in a row show that the machine is at fault, not the arms.
MOST_FAILURES = 3
Turn = Literal["trained", "waiting", "idle"]


@dataclass(frozen=True)
class WorkOptions:
    """The choices of a worker.

    Attributes:
        data_dirs: folders of data sets, besides those that records name.
        any_machine: train seeds that were begun on machines of another class, too.
        retry: train runs that failed again, once.
    """

    data_dirs: Sequence[Path] = ()
    any_machine: bool = False
    retry: bool = False


@dataclass
class WorkDone:
    """The result of a worker.

    Attributes:
        trained: runs that it has trained.
        elsewhere: open runs whose seeds are for another class of machine, with that class.
        refused: experiments that cannot be trained here, with the reason.
        gave_up: whether it stopped because its runs failed one after the other.
    """

    trained: int = 0
    elsewhere: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    gave_up: bool = False


def work(
    runs: Path,
    executor: Executor,
    reporter: ExperimentReporter,
    options: WorkOptions | None = None,
    claimant: Claimant | None = None,
) -> WorkDone:
    """Train runs of the experiments that are registered for workers, until none needs this worker.

    A run is trained by the rules of :mod:`storylab.experiments.scheduler`. When all runs of a look have a
    result, one of the workers judges it. This waits while other workers train, to take their runs over if
    they end.

    Args:
        runs: the folder of runs.
        executor: carries out the training.
        reporter: shows the progress.
        options: the choices of this worker.
        claimant: takes the leases.

    Raises:
        UserError: the folder or a record cannot be read or written.
        Interrupted: a signal stopped it; its run is saved, and any worker goes on with it.
    """
    worker = _Worker(runs, executor, reporter, options or WorkOptions(), claimant or Claimant())
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)

    with stop_signals(stop):
        while worker.turn():
            if signals:
                raise Interrupted("the worker was stopped", signals[0])
    return worker.result


@dataclass(frozen=True)
class _Known:
    """An experiment as it was opened for a version of its record, or why it cannot be trained here."""

    version: object
    opened: tuple[QueuedExperiment, SeedClasses] | str


class _Worker:
    def __init__(
        self,
        runs: Path,
        executor: Executor,
        reporter: ExperimentReporter,
        options: WorkOptions,
        claimant: Claimant,
    ) -> None:
        self._runs, self._executor, self._reporter = runs, executor, reporter
        self._options, self._claimant = options, claimant
        self._cache = FolderCache()
        self._known: dict[Path, _Known] = {}
        self._failures = 0
        self.result = WorkDone()

    def turn(self) -> bool:
        """Train one run, or wait a moment; returns False when nothing needs this worker any more."""
        self.result.elsewhere, self.result.refused = {}, {}
        waiting = False
        for path, record in queued_records(self._runs, self._cache):
            opened = self._open(path, record)
            if opened is None:
                continue
            state = self._turn_of(*opened)
            if state == "trained":
                return not self.result.gave_up
            waiting |= state == "waiting"
        if waiting:  # not in step with other workers
            time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))
        return waiting

    def _open(
        self, path: Path, record: ExperimentRecord
    ) -> tuple[QueuedExperiment, SeedClasses] | None:
        """An experiment, opened again where its plan has changed; None if it cannot be trained here."""
        assert record.registered is not None
        version = (record.queued, record.registered.sha256, len(record.amendments))
        if path not in self._known or self._known[path].version != version:
            self._known[path] = self._opened(path, version)
        known = self._known[path]
        if isinstance(known.opened, str):
            self.result.refused[path.stem] = known.opened
            return None
        return known.opened

    def _opened(self, path: Path, version: object) -> _Known:
        options = self._options
        try:
            queued = open_queued(path, self._cache, options.data_dirs, options.retry)
        except UserError as error:
            return _Known(version, str(error))
        return _Known(version, (queued, SeedClasses(queued)))

    def _turn_of(self, queued: QueuedExperiment, classes: SeedClasses) -> Turn:
        """Train one run of an experiment if one is free, else say whether other processes are at it."""
        while queued.part:
            some, waiting = False, False
            for run in queued.open_runs():
                some = True
                if not self._options.any_machine and (other := classes.other_class(run)):
                    self.result.elsewhere[run.label] = other
                elif self._train(queued, run):
                    return "trained"
                else:
                    waiting = True
            if some:
                return "waiting" if waiting else "idle"
            lines = queued.end_look(self._claimant)
            if lines is None:
                return "waiting"
            for line in lines:
                self._reporter.line(line)
        return "idle"

    def _train(self, queued: QueuedExperiment, run: PlannedRun) -> bool:
        """Train a run unless another process does; returns whether there was something to do."""
        kept = ENDED if queued.retry else (*ENDED, FAILED)
        reporter, claimant = self._reporter, self._claimant
        run = dataclasses.replace(run, cache=FolderCache())  # whose rows need not be kept
        if not train_if_free(run, self._executor, reporter, claimant, kept):
            return False
        queued.close(run)
        self.result.trained += 1
        self._failures = 0 if run.read_state() in ENDED else self._failures + 1
        self.result.gave_up = self._failures >= MOST_FAILURES
        return True
