"""``storylab experiment run``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storylab.cli.arguments import DEFAULT_RUNS_DIR, ExperimentFile
from storylab.cli.registry import Call, Verb

if TYPE_CHECKING:
    from storylab.record.index import RunCache


@dataclass(frozen=True)
class ExperimentRunCommand:
    """Run an experiment file: every arm with every seed, then the comparison and the report.

    Finished runs are not trained again, and a stopped experiment continues where it stopped. With more
    seeds than the first planned look needs, arms are judged at every look on the way, and those that are
    settled stop there.

    Examples: storylab experiment run experiments/04-sliding-window.toml --scale laptop
    | storylab experiment run mine.toml --seeds 8 --only full --dry_run
    """

    file: ExperimentFile
    """Experiment file (TOML)."""
    scale: str | None = None
    """One of the file's scales; by default laptop if the file has it, else the first."""
    seeds: int | None = None
    """Number of seeds, trained look by look; by default those that the file lists."""
    only: tuple[str, ...] = ()
    """Run these arms only."""
    dry_run: bool = False
    """Show the plan, with expected time and memory from a short calibration and the differences that it can
    see, and stop."""
    fresh: bool = False
    """Train everything again; earlier runs are set aside, not deleted."""
    runs: Path = DEFAULT_RUNS_DIR
    """Folder that holds the run folders."""
    data_dir: Path | None = None
    """Prepared data set; by default the one that the file's [data] describes."""


def run(call: Call) -> int:
    """Run the experiment: train its arms, compare them and write the report."""
    command = call.parse(ExperimentRunCommand)
    from storylab.cli.console import ConsoleReporter
    from storylab.cli.experiments import plan_lines, prepare_and_plan, resumable, train_planned
    from storylab.experiments.foresight import foresight_lines
    from storylab.experiments.spec import load_experiment

    experiment = load_experiment(command.file, command.scale)
    seeds = experiment.first_seeds(command.seeds)
    dataset, planned = prepare_and_plan(
        experiment, command.data_dir, command.runs, seeds, command.only
    )
    if command.dry_run:
        with resumable(), ConsoleReporter() as reporter:
            for line in plan_lines(experiment, planned, call.executor, reporter, command.fresh):
                reporter.line(line)
            cache = planned[0].cache
            for line in foresight_lines(experiment, dataset.fingerprint, command.runs, cache):
                reporter.line(line)
        return 0
    record, states = train_planned(
        experiment, dataset, planned, command.runs, call.executor, command.fresh
    )
    _print_results(record, command.runs, planned[0].cache)
    return 0 if "finished" in states else 1


def _print_results(record: Path, runs: Path, cache: RunCache) -> None:
    """Print the verdicts of an experiment and write the report of all experiments; reuses the runs
    in ``cache``."""
    from storylab.experiments.outcome import load_outcome
    from storylab.experiments.verdicts import verdict_line
    from storylab.reporting.report import write_report

    outcome = load_outcome(record, cache)
    print()
    for comparison in outcome.comparisons:
        print(verdict_line(comparison))
    for problem in outcome.problems:
        print(f"not in the comparison: {problem}")
    folder = write_report(runs, runs / "report", cache, {record: outcome})
    print(f"\nReport: {folder / 'EXPERIMENTS.md'} and {folder / 'index.html'}")


VERB = Verb(
    "experiment run",
    "train the arms of an experiment and compare them",
    "experiments",
    run,
    operand="FILE",
    position=1,
)
