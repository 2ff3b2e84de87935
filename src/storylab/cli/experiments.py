"""Plan and train an experiment on the terminal; shared by several verbs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from storylab.cli.console import ConsoleReporter, print_lines
from storylab.cli.documents import print_document
from storylab.errors import Interrupted, UserError

if TYPE_CHECKING:
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
    from storylab.record.run import ENDED

    with resumable(fresh), ConsoleReporter() as reporter:
        if fresh or any(run.read_state() not in ENDED for run in planned):
            for line in plan_lines(experiment, planned, executor, reporter, fresh):
                reporter.line(line)
        return run_by_looks(experiment, dataset, planned, runs, executor, reporter, fresh)


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
        for line in plan_lines(experiment, planned, executor, reporter, fresh):
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


def require_document(json: bool, dry_run: bool) -> None:
    """Raise a UserError if --json is given for a plan, which has another verb for it."""
    if json and dry_run:
        raise UserError(
            "--dry_run has no JSON: give one of the two, or see `storylab plan FILE --json`"
        )


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


def plan_lines(
    experiment: Experiment,
    planned: Sequence[PlannedRun],
    executor: Executor,
    reporter: ConsoleReporter,
    fresh: bool = False,
) -> Iterator[str]:
    """The plan of an experiment: its runs, with their expected time and memory.

    Raises:
        Interrupted: a signal stopped a calibration.
    """
    from storylab.experiments.effect_words import design_lines
    from storylab.planning.estimate import estimate_runs
    from storylab.record.run import ENDED
    from storylab.training.cores import SOME_CORES

    rows, left, others = [], {}, 0.0
    for number, (run, estimate) in enumerate(estimate_runs(planned, executor)):
        reporter.progress("calibrating", number, len(planned))
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
    yield _plan_head(experiment, len(planned), sum(left.values()))
    yield from rows
    if experiment.factorial:
        seeds = len({run.seed for run in planned})
        yield from design_lines(experiment.factorial, seeds, len(experiment.conditions))
    if others >= SOME_CORES:
        yield _other_programs(others)


def _plan_head(experiment: Experiment, runs: int, seconds: float) -> str:
    from storylab.training.log_format import format_duration

    return (
        f"Plan: {experiment.title}{f', scale {experiment.scale}' if experiment.scale else ''}: "
        f"{runs} runs, about {format_duration(seconds)} to go (as a like run took before, or predicted by "
        "a calibration of seconds)"
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
