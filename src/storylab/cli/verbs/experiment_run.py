"""``storylab experiment run``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from storylab.cli.arguments import DEFAULT_RUNS_DIR, ExperimentFile
from storylab.cli.registry import Call, Verb


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
    from storylab.cli.experiments import prepare_and_plan, print_plan, print_results, train_planned
    from storylab.experiments.spec import load_experiment

    experiment = load_experiment(command.file, command.scale)
    seeds = experiment.first_seeds(command.seeds)
    dataset, planned = prepare_and_plan(
        experiment, command.data_dir, command.runs, seeds, command.only
    )
    if command.dry_run:
        print_plan(experiment, dataset, planned, command.runs, call.executor, command.fresh)
        return 0
    record, states = train_planned(
        experiment, dataset, planned, command.runs, call.executor, command.fresh
    )
    print_results(record, command.runs, planned[0].cache)
    return 0 if "finished" in states else 1


VERB = Verb(
    "experiment run",
    "train the arms of an experiment and compare them",
    "experiments",
    run,
    operand="FILE",
    position=1,
)
