"""Train the runs of an experiment in order, skip those that have ended, and show the progress."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from storylab.errors import Interrupted, UserError
from storylab.execution.job import Event, Executor, Job, Outcome
from storylab.experiments.attempts import set_aside, train_run
from storylab.experiments.leases import claim_run, wait_for_folder
from storylab.experiments.plan import PlannedRun
from storylab.experiments.progress import ExperimentReporter, TokenCount
from storylab.files import exists, reading
from storylab.leases import Claimant, Fence, Lease, LeaseLost
from storylab.record.run import ENDED, FAILED, FINISHED
from storylab.training.signals import stop_signals

POLL_SECONDS = 2.0


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


def train_if_free(
    run: PlannedRun,
    executor: Executor,
    reporter: ExperimentReporter,
    claimant: Claimant,
    kept: Collection[str] = (*ENDED, FAILED),
) -> bool:
    """Train one run, by the same rules, unless another process trains it.

    Args:
        run: a run of an experiment.
        executor: carries out the training.
        reporter: shows the progress.
        claimant: takes the lease of the run.
        kept: the states that are results: a run with one of them is not trained again.

    Returns:
        Whether the run needs no more work by this process; False if another process has it.

    Raises:
        Interrupted: a signal stopped it.
    """
    return _Scheduler([run], executor, reporter, False, claimant, kept).run_one()


class _Scheduler:
    def __init__(
        self,
        planned: Sequence[PlannedRun],
        executor: Executor,
        reporter: ExperimentReporter,
        fresh: bool,
        claimant: Claimant | None = None,
        kept: Collection[str] = ENDED,
    ) -> None:
        self._planned, self._executor = planned, executor
        self._reporter, self._fresh = reporter, fresh
        self._claimant, self._kept = claimant or Claimant(), kept
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
        with stop_signals(self._stop), ThreadPoolExecutor(slots) as pool, self._leaving_no_job():
            # This thread fills one of the slots.
            others = [pool.submit(self._work) for _ in range(slots - 1)]
            self._work()
            for other in others:
                other.result()
        self._tokens.show_end()
        return [self._states[index] for index in range(len(self._planned))]

    def run_one(self) -> bool:
        """See :func:`train_if_free`."""
        with stop_signals(self._stop), self._leaving_no_job():
            return self._take_one() and not self._left

    @contextmanager
    def _leaving_no_job(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # a second Ctrl-C, say
            if self._signal is None:  # jobs that have been asked to stop are saving
                self._stop(signal.SIGTERM)
            raise

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
        waits: set[int] = set()
        while self._left:
            self._require_going()
            if self._take_one():
                continue
            for index in self._left[:1]:
                if index not in waits:
                    waits.add(index)
                    name = self._name(index)
                    self._line(f"{name}: another process is training it; waiting for that")
            self._wait()

    def _take_one(self) -> bool:
        """Settle the first run that no other process or thread trains; returns whether there was one."""
        for index in tuple(self._left):
            with claim_run(self._claimant, self._planned[index].folder) as lease:
                if lease is None or not self._take(index):
                    continue
                try:
                    self._states[index] = self._settle(index, lease)
                except LeaseLost as lost:
                    self._line(f"{self._name(index)}: {lost}")
                    self._left.insert(0, index)
                return True
        return False

    def _take(self, index: int) -> bool:
        """Take a run that is left; False if another thread has."""
        with self._lock:
            taken = index in self._left
            if taken:
                self._left.remove(index)
        return taken

    def _name(self, index: int) -> str:
        return f"[{index + 1}/{len(self._planned)}] {self._planned[index].label}"

    def _settle(self, index: int, lease: Lease) -> str:
        """Train a run whose lease we hold unless it has ended; returns its state."""
        run, name = self._planned[index], self._name(index)
        with self._lock:
            self._tokens.show(name)
        tokens = 0.0
        try:
            state = self._run_or_skip(run, name, lease)
            tokens = run.tokens
        except UserError as error:  # of this run's folder: the others go on
            self._line(f"{name}: failed: {error}")
            state, tokens = FAILED, run.tokens
        finally:
            with self._lock:
                self._tokens.finish(name, tokens)
        return state

    def _wait(self) -> None:
        self._require_going()
        time.sleep(POLL_SECONDS)

    def _run_or_skip(self, run: PlannedRun, name: str, lease: Lease) -> str:
        """Train a run whose lease we hold, unless it has a result; returns its state."""
        again = self._fresh and run.folder not in self._seen
        self._seen.add(run.folder)
        state, reason = run.read_state_and_reason()
        if state == "damaged":
            _require_readable(run.folder)
        if exists(run.folder) and (state == "damaged" or again):
            why = f"damaged ({reason})" if state == "damaged" else "to be trained again"
            self._line(f"{name}: {why}, set aside as {set_aside(run.folder)}")
            state = "new"
        if state in self._kept:
            note = ", by another version of the code" if run.read_is_by_other_code() else ""
            where = f"trained before{note}: {run.folder}"
            self._line(f"{name}: {outcome_line(run)} ({where})")
            return state
        if state == "unfinished" and run.read_is_by_other_code():
            self._line(f"{name}: begun by another version of the code; going on with it")
        train_run(
            run,
            execute=lambda job: self._execute(job, run, name, lease),
            report=lambda note: self._line(f"{name}: {note}"),
        )
        self._line(f"{name}: {outcome_line(run)}")
        return run.read_state()

    def _execute(self, job: Job, run: PlannedRun, name: str, lease: Lease) -> Outcome:
        """Have a job carried out under a lease and show its progress.

        Raises:
            LeaseLost: another process has the run by now, so that nothing may be written to it.
        """

        def show(event: Event) -> None:
            with self._lock:
                if self._executor.slots == 1:  # bars of several runs would replace each other
                    self._reporter.progress(event.name, event.done, event.total)
                if event.name == "training":
                    self._tokens.show(name, event.done / event.total * run.tokens)

        # A machine that was lost may still be at work on the run, and about to save it.
        wait_for_folder(run.folder, self._wait)
        options = {**job.options, "lease": dataclasses.asdict(lease)}
        outcome = self._executor.run(dataclasses.replace(job, options=options), show)
        self._require_going()
        Fence(lease).check()
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
