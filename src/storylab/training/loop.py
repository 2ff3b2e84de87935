"""The training loop of one run."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from storylab.data.batches import Prefetcher
from storylab.errors import Diverged, Interrupted
from storylab.optim.schedule import learning_rate
from storylab.record.folder import RunFolder
from storylab.record.stages import append_to_log, write_precision
from storylab.training import log_format
from storylab.training.checkpointing import Checkpoints
from storylab.training.checks.compiled import require_blameless_compiler
from storylab.training.cores import CoreSharing, same_bits_with_one_thread
from storylab.training.divergence import Recovery
from storylab.training.evaluator import Evaluator
from storylab.training.observers import Observers
from storylab.training.ranks import ONE_PROCESS, Ranks
from storylab.training.recorder import Recorder
from storylab.training.run_progress import InFlightStep, StepsInFlight, StopRequested, StopSignal
from storylab.training.setup import TrainingSetup
from storylab.training.signals import stop_signals
from storylab.training.step import NonFiniteError
from storylab.training.summary import write_diverged, write_finished


def fit(
    setup: TrainingSetup, run: RunFolder, observers: Observers, ranks: Ranks = ONE_PROCESS
) -> RunFolder:
    """Train from the current progress to ``max_iters``, evaluate, and sum up.

    The caller holds the run folder, so that nobody else writes to it. All ``ranks`` call this together.

    Raises:
        Interrupted: a signal stopped it; the run can be resumed.
        Diverged: loss or gradients are not finite, and the config says to stop or nothing else has helped.
        UserError: the disk is full, or compiled code is at fault for numbers that are not finite.
    """
    loop = Loop(setup, run, observers, ranks)
    with loop.running():
        loop.start()
        while setup.progress.next_iteration < setup.config.iterations:
            with loop.recovering():
                _iterate(loop)
        loop.finish()
    return run


def _iterate(loop: Loop) -> None:
    """Train from the current progress to ``max_iters``.

    Raises:
        NonFiniteError: loss or gradients are not finite, and the step is not skipped.
    """
    for iteration in range(loop.progress.next_iteration, loop.config.iterations):
        if loop.evaluation_due(iteration):
            loop.evaluate(iteration)
        loop.step(iteration)
        save = loop.checkpoint_due(iteration)
        if save or loop.reading_due(iteration):
            loop.read()
        if save:
            loop.checkpoints.save_last()
    loop.read()


class Loop:
    """The parts of a run under way. Each iteration calls them in the order that :func:`_iterate` shows."""

    def __init__(
        self, setup: TrainingSetup, run: RunFolder, observers: Observers, ranks: Ranks
    ) -> None:
        setup.require_same(ranks)
        setup.state.join(ranks)
        self.setup, self.run, self.observers = setup, run, observers
        self.config, self.state, self.progress = setup.config, setup.state, setup.progress
        device, self.stop = setup.precision.device, StopSignal(ranks)
        self.recorder = Recorder(run, self.config, self.progress, device, observers, ranks)
        self.checkpoints = Checkpoints(run, self.state, self.progress, self.recorder.telemetry)
        self.prefetcher = Prefetcher(setup.batches, pin=device.type == "cuda")
        self.in_flight = StepsInFlight(device)
        # Timing ways of waiting is for a process that waits for no other.
        alone = device.type == "cpu" and ranks.size == 1
        self.cores = CoreSharing(alone, self._thread_free, self.recorder.line)
        self.recovery = Recovery(setup, run, self.checkpoints)
        parts = self.recorder, self.checkpoints, self.cores
        self.evaluator = Evaluator(setup, *parts, leave=self.stop.check)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure power, note signals, and turn a stop or numbers that are not finite into a saved end."""
        self.observers.log = lambda line: append_to_log(self.run, line)
        self.observers.start(self.run.folder)
        try:
            with self.recorder.telemetry, stop_signals(self.stop.note):
                try:
                    with self._saved_when_stopped():
                        yield
                except NonFiniteError as error:
                    self.read()  # float16 raises before the steps in flight are read
                    require_blameless_compiler(self.setup, error)
                    self.checkpoints.settle()
                    message, summary = write_diverged(self.run, self.setup, error, self._measured())
                    self.observers.end(summary)
                    raise Diverged(message) from error
        finally:
            self.checkpoints.saver.close()
            self.cores.close()
            self.prefetcher.close()

    @contextmanager
    def _saved_when_stopped(self) -> Iterator[None]:
        """Save the run where a signal has come. A step in flight may turn out to have diverged."""
        try:
            yield
        except StopRequested:
            self._save_at_stop()
            self.checkpoints.saver.wait()
            self.observers.end(None)
            message = (
                f"Stopped before iteration {self.progress.next_iteration}; continue with: "
                f"storylab resume {self.run.folder}"
            )
            raise Interrupted(message, self.stop.number or signal.SIGINT) from None

    def _save_at_stop(self) -> None:
        try:
            self.read()
        except NonFiniteError:
            if not self.recovery.rewinds:
                raise
            return  # the resumed run comes to the same fault, and goes back
        self.checkpoints.save_last()

    def start(self) -> None:
        """Save a first checkpoint, print the lines for the user, and record the checks."""
        if self.checkpoints.save_first():
            cuda = self.setup.precision.device.type == "cuda"
            for line in log_format.opening_lines(self.config, self.setup.batches, cuda):
                self.recorder.line(line)
        if (found := self.setup.precision_info) is not None:
            write_precision(self.run, found)
            self.recorder.line(log_format.precision_line(self.config.dtype, found))
        if self.setup.checks is not None and self.setup.checks.skipped:
            self.recorder.line("Checks before the first step were skipped (--skip_checks)")

    def step(self, iteration: int) -> None:
        """Take the batch of an iteration and start its step; a GPU may still be at it afterwards."""
        started = time.perf_counter()
        batch = self.prefetcher(self.progress.batch(iteration))
        batch = batch.to(self.setup.precision.device, non_blocking=True)
        waited = time.perf_counter() - started
        self.cores.begin()
        observed = self.config.quantization_stats and (
            iteration == 0 or self.evaluation_due(iteration)
        )
        with self.recorder.quantization(self.state.quantization if observed else None, iteration):
            rate = learning_rate(self.config, iteration)
            result = self.state.step(iteration, batch, rate, self._between)
        self.cores.end()
        self.in_flight.add(InFlightStep(iteration, result, waited), started)

    def _between(self) -> None:
        """Where an iteration may be left."""
        self.stop.check()
        self.cores.tick()

    def _thread_free(self) -> bool:
        """Whether the next micro-batch gives the same bits with one thread."""
        iteration = self.progress.next_iteration
        windows = self.setup.batches(self.progress.batch(iteration))[: self.config.batch_size]
        rate = learning_rate(self.config, iteration)
        return same_bits_with_one_thread(self.state, iteration, windows, rate)

    def evaluation_due(self, iteration: int) -> bool:
        """Whether to evaluate before the step of ``iteration``."""
        due = iteration % self.config.eval_interval == 0 or iteration == self.config.max_iters
        return due and iteration > 0

    def checkpoint_due(self, iteration: int) -> bool:
        """Whether to save after the step of ``iteration``."""
        # A run that rewinds has saved at the evaluation itself.
        evaluated = self.evaluation_due(iteration) and not self.recovery.rewinds
        return evaluated or self.checkpoints.minutes_passed()

    def reading_due(self, iteration: int) -> bool:
        """Whether to wait for the steps in flight after that of ``iteration``."""
        line_due = iteration % self.config.log_interval == 0
        return line_due or self.evaluation_due(iteration + 1) or not self.in_flight.runs_ahead

    def evaluate(self, iteration: int) -> None:
        """Evaluate before the step of ``iteration``; a run that rewinds may come back to here.

        Raises:
            NonFiniteError: a loss is not finite.
        """
        self.evaluator.evaluate(iteration)
        if self.recovery.rewinds:
            self.checkpoints.save_last(rewind=True)

    @contextmanager
    def recovering(self) -> Iterator[None]:
        """Rewind where loss or gradients are not finite, if the config asks for it."""
        try:
            yield
        except NonFiniteError as error:
            if not self.recovery.rewinds:
                raise
            fault = self._first_fault(error)
            require_blameless_compiler(self.setup, fault)
            rewind = self.recovery.rewind(fault)
            self.recorder.line(log_format.rewind_line(rewind))

    def _first_fault(self, error: NonFiniteError) -> NonFiniteError:
        """The fault at which the run is, which a step in flight may have had before ``error``."""
        try:
            self.read()  # float16 raises before the steps in flight are read
        except NonFiniteError as earlier:
            return earlier
        return error

    def read(self) -> None:
        """Wait for the steps in flight and record them.

        Raises:
            NonFiniteError: loss or gradient of one was not finite; those before it are recorded.
        """
        done, since, fault = self.in_flight.read(self.recovery.skips)
        self.recorder.steps(done, since)
        if fault is not None:
            raise fault

    def finish(self) -> None:
        """Evaluate the final weights on the whole validation and test splits, sample, and sum up."""
        if not self.checkpoints.up_to_date:
            self.checkpoints.save_last()
        final = self.evaluator.final()
        self.checkpoints.settle()
        measured, line = self._measured(), self.recorder.line
        summary = write_finished(self.run, self.setup, final, measured, line)
        self.observers.end(summary)

    def _measured(self) -> dict[str, Any]:
        """Power, energy, and cores that other programs used, for the summary."""
        return self.recorder.telemetry.means() | {"other_cores": self.cores.other_cores}
