"""Expected time and memory of planned runs, from runs that have finished or from short calibrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storylab.config import TrainConfig, timing_key
from storylab.execution.job import Executor, Job, OnEvent, Outcome, run_interruptibly
from storylab.experiments.experiment import Cell
from storylab.experiments.plan import PlannedRun
from storylab.record.run import FINISHED
from storylab.training.measure import Measured


@dataclass(frozen=True)
class Calibration:
    """Timings of a few steps and evaluations of a run.

    Attributes:
        micro_batch_seconds: forward and backward pass of one micro-batch.
        update_seconds: one update; 0 where an iteration is one micro-batch and both were timed as one.
        evaluation_batch_seconds: one batch of an evaluation.
        evaluation_batches: batches in the whole validation and test splits, the last ones in part.
        peak_memory_bytes: of the device, or of the process on a CPU.
        other_cores: how many cores other programs used meanwhile.
    """

    micro_batch_seconds: float
    update_seconds: float
    evaluation_batch_seconds: float
    evaluation_batches: float
    peak_memory_bytes: float
    other_cores: float

    def estimate(self, config: TrainConfig) -> Estimate:
        """The estimate of a run with ``config``."""
        evaluations = -(-config.max_iters // config.eval_interval)
        batches = 2 * config.eval_iters * evaluations + self.evaluation_batches
        memory = self.peak_memory_bytes
        steps = Measured(self.micro_batch_seconds, self.update_seconds, memory)
        seconds = steps.seconds(config) + batches * self.evaluation_batch_seconds
        return Estimate(seconds, memory, measured=False, other_cores=self.other_cores)


@dataclass(frozen=True)
class Estimate:
    """Expected time and memory of a run.

    Attributes:
        seconds: from the first iteration to the last evaluation.
        memory_bytes: peak.
        measured: a run of the same cell has taken this, so it is no prediction.
        other_cores: how many cores other programs used during the calibration.
    """

    seconds: float
    memory_bytes: float
    measured: bool
    other_cores: float = 0.0


def estimate_runs(
    planned: Sequence[PlannedRun], executor: Executor
) -> Iterator[tuple[PlannedRun, Estimate | None]]:
    """Each run with its estimate; None where the calibration failed.

    Runs of one cell share the time of the first that has finished. Other runs whose steps take the same
    time share one calibration.

    Raises:
        Interrupted: a signal stopped a calibration.
    """
    calibrations: dict[str, Calibration | None] = {}
    finished: dict[Cell, Estimate | None] = {}
    for run in planned:
        if run.cell not in finished:
            finished[run.cell] = _read_finished([r for r in planned if r.cell == run.cell])
        estimate = finished[run.cell]
        if estimate is None:
            key = timing_key(run.config)
            if key not in calibrations:
                calibrations[key] = _calibration(run.config, executor)
            calibration = calibrations[key]
            estimate = calibration.estimate(run.config) if calibration else None
        yield run, estimate


def _read_finished(runs: Sequence[PlannedRun]) -> Estimate | None:
    """The time and memory of the first run that has finished."""
    for run in runs:
        if run.read_state() == FINISHED:
            summary = run.cache.load(run.folder).results
            return Estimate(summary.seconds, summary.peak_memory_bytes, measured=True)
    return None


def _calibration(config: TrainConfig, executor: Executor) -> Calibration | None:
    """A calibration, or None if it fails: training will fail too, and keep the reason as its result."""
    answer = run_interruptibly(executor, Job("measure", config)).answer
    return Calibration(**answer) if answer else None


class EstimatedExecutor:
    """Has another executor carry out jobs, and says how much time and memory the runs among them need.

    Args:
        executor: carries the jobs out.
        estimates: runs, each with its estimate if it has one.
    """

    def __init__(
        self, executor: Executor, estimates: Sequence[tuple[PlannedRun, Estimate | None]]
    ) -> None:
        self._executor = executor
        self._estimates = {run.folder: estimate for run, estimate in estimates if estimate}
        self.slots = executor.slots

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        """See :class:`storylab.execution.job.Executor`."""
        out_dir = job.config.out_dir
        found = self._estimates.get(out_dir) if out_dir and job.action == "train" else None
        if found is not None:
            job = dataclasses.replace(job, seconds=found.seconds, memory_bytes=found.memory_bytes)
        return self._executor.run(job, on_event)

    def stop(self) -> None:
        """See :class:`storylab.execution.job.Executor`."""
        self._executor.stop()
