"""Writes the rows and log lines of a run, keeps its clocks, and shows both to observers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from storylab.config import TrainConfig
from storylab.optim.schedule import learning_rate
from storylab.precision.state import QuantizationState
from storylab.precision.stats import QuantizationStatistics
from storylab.record.folder import LOG, RunFolder
from storylab.record.schema import IterationRow, QuantizationRow, Row
from storylab.training import log_format
from storylab.training.observers import Observers
from storylab.training.ranks import ONE_PROCESS, Ranks
from storylab.training.run_progress import InFlightStep, RunProgress
from storylab.training.step import StepMetrics
from storylab.training.telemetry import Telemetry


class Recorder:
    """Writes the run folder's ``metrics.jsonl`` and ``log.txt``, and keeps the clocks for their numbers.

    Clocks start at construction; ``progress`` holds their sums, in seconds.
    """

    def __init__(
        self,
        run: RunFolder,
        config: TrainConfig,
        progress: RunProgress,
        device: torch.device,
        observers: Observers,
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        self.run, self.config, self.progress = run, config, progress
        self.observers = observers
        self.telemetry = Telemetry(device, progress.power, ranks)
        self._lap_start = time.perf_counter()

    def line(self, text: str) -> None:
        """Add a line to the log."""
        self.run.append(LOG, text)
        self.observers.line(text)

    def rows(self, rows: Sequence[Row]) -> None:
        """Add rows to the metrics."""
        self.run.append_rows(rows)
        for row in rows:
            self.observers.row(row)

    def steps(self, done: Sequence[tuple[InFlightStep, StepMetrics]], since: float) -> None:
        """Record steps that are done, and the log line that is due at the last of them.

        The clock, the meters and the files are looked at once for all, as a GPU idles meanwhile. Each step
        is given its share of the time since ``since``, by ``time.perf_counter``, when the first began.
        """
        if not done:
            return
        progress, config = self.progress, self.config
        now = time.perf_counter()
        seconds = (now - since) / len(done)
        progress.seconds += now - self._lap_start
        progress.seconds_since_line += now - self._lap_start
        self._lap_start = now
        progress.training_seconds += seconds * len(done)
        peak = max(progress.peak_memory_bytes, self.telemetry.peak_memory())
        progress.peak_memory_bytes = peak
        meters = self.telemetry.latest()
        self.rows([self._iteration_row(*step, seconds, meters) for step in done])
        for step, skipped in done:
            if skipped.fault:
                self.line(f"iteration {step.iteration}: {skipped.fault}; the step was skipped")
        last, metrics = done[-1]
        progress.next_iteration = last.iteration + 1
        if last.iteration % config.log_interval == 0 or last.iteration == config.max_iters:
            tokens = (last.iteration - progress.last_line) * config.tokens_per_iteration
            rate = learning_rate(config, last.iteration)
            elapsed = progress.seconds_since_line
            loss = math.nan if metrics.loss is None else metrics.loss
            self.line(log_format.iteration_line(last.iteration, loss, elapsed, tokens, rate))
            progress.last_line, progress.seconds_since_line = last.iteration, 0.0
        self.observers.progress("training", last.iteration + 1, config.iterations)

    @contextmanager
    def quantization(self, state: QuantizationState | None, iteration: int) -> Iterator[None]:
        """Record statistics of the tensors that are quantized in ``iteration``; none without a state."""
        if state is None:
            yield
            return
        statistics = QuantizationStatistics()
        with state.observed(statistics):
            yield
        self.rows([QuantizationRow(iteration=iteration, **row) for row in statistics.rows()])

    def _iteration_row(
        self,
        step: InFlightStep,
        metrics: StepMetrics,
        seconds: float,
        meters: Mapping[str, float | None],
    ) -> IterationRow:
        tokens = self.config.tokens_per_iteration
        return IterationRow(
            iteration=step.iteration,
            loss=metrics.loss,
            learning_rate=learning_rate(self.config, step.iteration),
            grad_norm=metrics.grad_norm,
            clipped=metrics.clipped,
            tokens=(step.iteration + 1) * tokens,
            tokens_per_second=tokens / seconds,
            step_seconds=seconds,
            data_seconds=step.waited,
            peak_memory_bytes=self.progress.peak_memory_bytes,
            power_watts=meters["power_watts"],
            utilization_percent=meters["utilization_percent"],
            energy_joules=meters["energy_joules"],
        )
