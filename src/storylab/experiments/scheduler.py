"""Train the runs of an experiment in order, skip those that have ended, and show the progress."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from storylab.errors import Interrupted, UserError
from storylab.execution.job import Event, Executor, Job, Outcome
from storylab.experiments.attempts import set_aside, train_run
from storylab.experiments.leases import is_taken, run_lease
from storylab.experiments.plan import PlannedRun
from storylab.files import exists, reading
from storylab.record.run import ENDED, FINISHED
from storylab.training.signals import stop_signals

POLL_SECONDS = 2.0


class ExperimentReporter(Protocol):
    """Shows the progress of an experiment."""

    def line(self, text: str) -> None:
        """A line for the user."""
        ...

    def progress(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` parts of the work called ``name``, within one run, are done."""
        ...

    def overall(self, name: str, done: float, total: float) -> None:
        """``done`` of ``total`` tokens of the whole experiment are done; the run ``name`` is under way."""
        ...


class TokenCount:
    """Counts the tokens of an experiment that are trained, and shows them.

    Args:
        planned: all runs.
        reporter: shows the count.
    """

    def __init__(self, planned: Sequence[PlannedRun], reporter: ExperimentReporter) -> None:
        self._reporter = reporter
        self._total = float(sum(run.tokens for run in planned))
        self._done = 0.0
        self._under_way: dict[str, float] = {}

    def show(self, name: str, tokens: float = 0.0) -> None:
        """``tokens`` of the run ``name`` are trained so far."""
        self._under_way[name] = tokens
        done = self._done + sum(self._under_way.values())
        self._reporter.overall(name, done, self._total)

    def finish(self, name: str, tokens: float) -> None:
        """The run ``name``, of ``tokens``, needs no more work."""
        del self._under_way[name]
        self._done += tokens

    def show_end(self) -> None:
        """All runs are done."""
        self._reporter.overall("done", self._total, self._total)


def run_experiment(
    planned: Sequence[PlannedRun],
    executor: Executor,
    reporter: ExperimentReporter,
    fresh: bool = False,
) -> list[str]:
    """Train every run that has not ended, as many at a time as the executor has slots.

    An arm that diverges, fails or runs out of memory is kept as a result, and the others go on.

    Args:
        planned: the runs, in order.
        executor: carries out the training.
        reporter: shows the progress.
        fresh: train everything again; earlier runs are set aside.

    Returns:
        The state of every run.

    Raises:
        Interrupted: a signal stopped it; the same call goes on from there.
    """
    return _Scheduler(planned, executor, reporter, fresh).run()


class _Scheduler:
    def __init__(
        self,
        planned: Sequence[PlannedRun],
        executor: Executor,
        reporter: ExperimentReporter,
        fresh: bool,
    ) -> None:
        self._planned, self._executor = planned, executor
        self._reporter, self._fresh = reporter, fresh
        self._tokens = TokenCount(planned, reporter)
        self._left = list(range(len(planned)))
        self._states: dict[int, str] = {}
        self._seen: set[Path] = set()
        self._signal: int | None = None
        # Held while the fields above change or the reporter is called; never by a signal handler.
        self._lock = threading.Lock()

    def run(self) -> list[str]:
        """See :func:`run_experiment`."""
        slots = self._executor.slots
        # In this order, so that signals are heard until the last thread has ended.
        with stop_signals(self._stop), ThreadPoolExecutor(slots) as pool:
            try:
                # This thread fills one of the slots.
                others = [pool.submit(self._work) for _ in range(slots - 1)]
                self._work()
                for other in others:
                    other.result()
            except BaseException:
                if self._signal is None:  # jobs that have been asked to stop are saving
                    self._stop(signal.SIGTERM)
                raise
        self._tokens.show_end()
        return [self._states[index] for index in range(len(self._planned))]

    def _stop(self, number: int) -> None:
        """Stop at a signal."""
        self._signal = number
        self._executor.stop()

    def _require_going(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._signal is not None:
            raise Interrupted("the experiment was stopped", self._signal)

    def _work(self) -> None:
        """Take one run after the other until none is left."""
        while True:
            self._require_going()
            with self._lock:
                if not self._left:
                    return
                # Runs that another process trains come last, so that two processes share the work.
                free = (i for i in self._left if not is_taken(self._planned[i].folder))
                index = next(free, self._left[0])
                self._left.remove(index)
            self._states[index] = self._settle(index)

    def _settle(self, index: int) -> str:
        """Train a run unless it has ended; returns its state."""
        run = self._planned[index]
        name = f"[{index + 1}/{len(self._planned)}] {run.label}"
        with self._lock:
            self._tokens.show(name)
        if is_taken(run.folder):
            self._line(f"{name}: another process is training it; waiting for that")
        with run_lease(run.folder, self._wait):
            try:
                state = self._run_or_skip(run, name)
            except UserError as error:  # of this run's folder: the others go on
                self._line(f"{name}: failed: {error}")
                state = "failed"
        with self._lock:
            self._tokens.finish(name, run.tokens)
        return state

    def _wait(self) -> None:
        self._require_going()
        time.sleep(POLL_SECONDS)

    def _run_or_skip(self, run: PlannedRun, name: str) -> str:
        """Train a run whose lease we hold, unless it has ended; returns its state."""
        again = self._fresh and run.folder not in self._seen
        self._seen.add(run.folder)
        state, reason = run.read_state_and_reason()
        if state == "damaged":
            _require_readable(run.folder)
        if exists(run.folder) and (state == "damaged" or again):
            why = f"damaged ({reason})" if state == "damaged" else "to be trained again"
            self._line(f"{name}: {why}, set aside as {set_aside(run.folder)}")
            state = "new"
        if state in ENDED:
            note = ", by another version of the code" if run.read_is_by_other_code() else ""
            where = f"trained before{note}: {run.folder}"
            self._line(f"{name}: {outcome_line(run)} ({where})")
            return state
        if state == "unfinished" and run.read_is_by_other_code():
            self._line(f"{name}: begun by another version of the code; going on with it")
        train_run(
            run,
            execute=lambda job: self._execute(job, run, name),
            report=lambda note: self._line(f"{name}: {note}"),
        )
        self._line(f"{name}: {outcome_line(run)}")
        return run.read_state()

    def _execute(self, job: Job, run: PlannedRun, name: str) -> Outcome:
        """Have a job carried out and show its progress."""

        def show(event: Event) -> None:
            with self._lock:
                if self._executor.slots == 1:  # bars of several runs would replace each other
                    self._reporter.progress(event.name, event.done, event.total)
                if event.name == "training":
                    self._tokens.show(name, event.done / event.total * run.tokens)

        outcome = self._executor.run(job, show)
        self._require_going()
        if outcome.status == "interrupted":  # by another program
            raise Interrupted(outcome.reason, signal.SIGTERM)
        return outcome

    def _line(self, text: str) -> None:
        with self._lock:
            self._reporter.line(text)


def _require_readable(folder: Path) -> None:
    """Raise a UserError if this user may not read a run's files: the run may be whole."""
    with reading(folder):
        inside = folder.iterdir() if folder.is_dir() else ()
        for path in (folder, *inside):
            if path.exists() and not os.access(path, os.R_OK):
                raise UserError(f"cannot read {path}: Permission denied")


def outcome_line(run: PlannedRun) -> str:
    """A run's outcome in a few words."""
    state, reason = run.read_state_and_reason()
    if state != FINISHED:
        return f"{state} ({reason})" if reason else state
    found = run.cache.load(run.folder)
    return (
        f"val loss {found.loss:.4f}, "
        f"{found.results.tokens_per_second:,.0f} tok/s, "
        f"{found.results.peak_memory_bytes / 1e9:.2f} GB, {found.results.seconds:,.0f} s"
    )
