"""Plan and train an experiment on the terminal; shared by several verbs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from storylab.cli.console import ConsoleReporter
from storylab.cli.documents import print_document
from storylab.cli.tables import print_lines
from storylab.errors import Interrupted, UserError

if TYPE_CHECKING:
    from storylab.cli.arguments import ExperimentFlags
    from storylab.cli.verbs.noise import NoiseCommand
    from storylab.data.dataset import Dataset
    from storylab.execution.job import Executor
    from storylab.experiments.experiment import Experiment
    from storylab.experiments.outcome import Outcome
    from storylab.experiments.plan import PlannedRun
    from storylab.experiments.records import FolderCache
    from storylab.planning.estimate import Estimate


def prepare_and_plan(
    experiment: Experiment,
    data_dir: Path | None,
    runs: Path,
    seeds: Sequence[int],
    only: Sequence[str] = (),
) -> tuple[Dataset, list[PlannedRun]]:
    """The data set of an experiment, prepared if necessary, and the planned runs.

    Args:
        experiment: all of it.
        data_dir: a prepared data set to use instead of the one that the experiment describes.
        runs: the folder for run folders.
        seeds: the seeds of every arm.
        only: arms to train; by default all.

    Raises:
        UserError: the experiment cannot run, or its data is not available.
    """
    from storylab.experiments.plan import plan_runs

    dataset = open_data(experiment, data_dir)
    return dataset, plan_runs(experiment, dataset, runs, seeds, only)


def open_data(experiment: Experiment, data_dir: Path | None) -> Dataset:
    """The data set in ``data_dir``, or that of an experiment, prepared if necessary.

    Raises:
        UserError: the experiment cannot run, or its data is not available.
    """
    from storylab.data.dataset import load_dataset
    from storylab.data.prepare import prepare
    from storylab.experiments.plan import require_runnable

    require_runnable(experiment)
    if data_dir is not None:
        return load_dataset(data_dir)
    with ConsoleReporter(count=False) as reporter:
        if not experiment.data.folder.exists():
            reporter.line(f"Preparing {experiment.data.folder}")
        try:
            return prepare(experiment.data, reporter.progress)
        except UserError as error:
            message = str(error).replace("--out", 'out = "FOLDER" in [data]')
            raise UserError(message) from error


def train_planned(
    experiment: Experiment,
    dataset: Dataset,
    planned: Sequence[PlannedRun],
    runs: Path,
    executor: Executor,
    fresh: bool = False,
) -> tuple[Path, list[str]]:
    """Show the plan, register it, and train look by look; returns the path of the record
    and the state of every run.

    Raises:
        Interrupted: a signal stopped it.
    """
    from storylab.experiments.stopping import run_by_looks
    from storylab.planning.estimate import EstimatedExecutor
    from storylab.record.run import ENDED

    with resumable(fresh), ConsoleReporter() as reporter:
        if fresh or any(run.read_state() not in ENDED for run in planned):
            estimates = estimated(planned, executor, reporter)
            for line in plan_lines(experiment, estimates, executor.slots, fresh):
                reporter.line(line)
            executor = EstimatedExecutor(executor, estimates)
        return run_by_looks(experiment, dataset, planned, runs, executor, reporter, fresh)


def chosen_executor(given: Executor, command: ExperimentFlags | NoiseCommand) -> Executor:
    """The executor that a command asks for: ``given`` unless its flags say something else.

    Raises:
        UserError: see :func:`storylab.execution.executors.make_executor`.
    """
    if command.executor == "local" and command.jobs is None and not command.executor_options:
        return given
    from storylab.execution.executors import make_executor

    return make_executor(command.executor, command.jobs, command.executor_options, command.runs)


def tracking(executor: Executor, names: Sequence[str]) -> Executor:
    """An executor whose runs are sent to the trackers ``names``.

    Raises:
        UserError: a tracker's library is not installed.
    """
    from storylab.tracking import require_installed

    if not names:
        return executor
    require_installed(names)
    from storylab.experiments.tracked import TrackingExecutor

    return TrackingExecutor(executor, names)


def print_plan(
    experiment: Experiment,
    dataset: Dataset,
    planned: Sequence[PlannedRun],
    runs: Path,
    executor: Executor,
    fresh: bool = False,
) -> None:
    """Print the plan of an experiment, and the differences that it can see.

    Raises:
        Interrupted: a signal stopped a calibration.
    """
    from storylab.experiments.foresight import foresight_lines

    with resumable(), ConsoleReporter() as reporter:
        estimates = estimated(planned, executor, reporter)
        for line in plan_lines(experiment, estimates, executor.slots, fresh):
            reporter.line(line)
        for line in foresight_lines(experiment, dataset.fingerprint, runs, planned[0].cache):
            reporter.line(line)


def print_results(record: Path, runs: Path, cache: FolderCache) -> Outcome:
    """Print the verdicts of an experiment and write the report of all experiments; reuses the runs
    in ``cache``. Returns the outcome of the experiment."""
    from storylab.experiments.effect_words import verdict_lines
    from storylab.experiments.outcome import load_outcome
    from storylab.reporting.report import write_report

    outcome = load_outcome(record, cache)
    print()
    for line in verdict_lines(outcome):
        print_lines(line)
    for problem in outcome.problems:
        print_lines(f"not in the comparison: {problem}")
    folder = write_report(runs, runs / "report", cache, {record: outcome})
    print_lines(f"\nReport: {folder / 'EXPERIMENTS.md'} and {folder / 'index.html'}")
    return outcome


def require_document(json: bool, dry_run: bool, register: bool) -> None:
    """Raise a UserError if --json is given where there are no verdicts to print."""
    if json and dry_run:
        raise UserError(
            "--dry_run has no JSON: give one of the two, or see `storylab plan FILE --json`"
        )
    if register and (json or dry_run):
        raise UserError(
            "--register trains nothing and has no verdicts: leave out --json and --dry_run"
        )


def register_for_workers(
    experiment: Experiment, dataset: Dataset, planned: Sequence[PlannedRun], runs: Path
) -> None:
    """Register an experiment for `storylab work`, and say how it goes on."""
    from storylab.experiments.queue import enqueue
    from storylab.experiments.stopping import plan_lines as registration_lines

    path = enqueue(experiment, dataset, planned, runs)
    record, seeds = planned[0].cache.record(path), len({run.seed for run in planned})
    for line in registration_lines(experiment, record, planned, seeds):
        print(line)
    print(f"Registered for workers in {path}: `storylab work {runs}` on any machine trains it")


def closing_code(outcome: Outcome, states: Sequence[str], by_verdict: bool, as_json: bool) -> int:
    """The exit code of an experiment: 1 if none of its runs has finished, else that of its verdicts if
    asked, else 0. Prints the document before, if asked."""
    from storylab.experiments.comparison import exit_code
    from storylab.experiments.comparison_document import experiment_document

    if as_json:
        print_document(lambda: experiment_document(outcome))
    if "finished" not in states:
        return 1
    return exit_code(outcome.verdicts) if by_verdict else 0


@contextmanager
def resumable(fresh: bool = False) -> Iterator[None]:
    """Add to the message of a stopped experiment how to continue it."""
    try:
        yield
    except Interrupted as stop:
        same = "the same command without --fresh" if fresh else "the same command"
        message = f"{stop}; {same} goes on from there"
        raise Interrupted(message, stop.signal_number) from None


def estimated(
    planned: Sequence[PlannedRun], executor: Executor, reporter: ConsoleReporter
) -> list[tuple[PlannedRun, Estimate | None]]:
    """Each run with its estimate; see :func:`storylab.planning.estimate.estimate_runs`.

    Raises:
        Interrupted: a signal stopped a calibration.
    """
    from storylab.planning.estimate import estimate_runs

    found = []
    for number, pair in enumerate(estimate_runs(planned, executor)):
        reporter.progress("calibrating", number, len(planned))
        found.append(pair)
    return found


def plan_lines(
    experiment: Experiment,
    estimates: Sequence[tuple[PlannedRun, Estimate | None]],
    slots: int,
    fresh: bool = False,
) -> Iterator[str]:
    """The plan of an experiment: its runs, with their expected time and memory, ``slots`` at a time."""
    from storylab.experiments.effect_words import design_lines
    from storylab.record.run import ENDED
    from storylab.training.cores import SOME_CORES

    rows, left, others = [], {}, 0.0
    for run, estimate in estimates:
        state = run.read_state()
        if fresh and state != "new":
            state = "again"
        if estimate is not None:
            if state not in ENDED:
                left[run.folder] = estimate.seconds  # once, however many cells share the run
            others = max(others, estimate.other_cores)
        rows.append(
            f"  {run.label:<44} {run.tokens:>13,} tokens  {_estimate_columns(estimate)}  {state}"
        )
    yield _plan_head(experiment, len(estimates), sum(left.values()), slots)
    yield from rows
    if experiment.factorial:
        seeds = len({run.seed for run, _ in estimates})
        yield from design_lines(experiment.factorial, seeds, len(experiment.conditions))
    if others >= SOME_CORES:
        yield _other_programs(others)


def _plan_head(experiment: Experiment, runs: int, seconds: float, slots: int) -> str:
    from storylab.training.log_format import format_duration

    together = min(slots, runs)
    at_once = f", {together} at a time" if together > 1 else ""
    return (
        f"Plan: {experiment.title}{f', scale {experiment.scale}' if experiment.scale else ''}: "
        f"{runs} runs{at_once}, about {format_duration(seconds / together)} to go (as a like run took "
        "before, or predicted by a calibration of seconds)"
    )


def _other_programs(cores: float) -> str:
    return (
        f"Other programs used up to {cores:.1f} of {os.cpu_count()} cores during the calibrations: the "
        "runs are faster without them"
    )


def _estimate_columns(estimate: Estimate | None) -> str:
    from storylab.training.log_format import format_duration

    if estimate is None:
        return f"{'cannot be calibrated':>35}"
    kind = "as before" if estimate.measured else "predicted"
    memory = f"{estimate.memory_bytes / 1e9:6.2f} GB"
    return f"{format_duration(estimate.seconds):>12}  {memory}  {kind:<9}"
