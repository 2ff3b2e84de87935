"""``storylab experiment run``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from storylab.cli.arguments import ExperimentFlags
from storylab.cli.documents import remarks_on_stderr
from storylab.cli.experiments import (
    chosen_executor,
    closing_code,
    prepare_and_plan,
    print_plan,
    print_results,
    register_for_workers,
    require_document,
    tracking,
    train_planned,
)
from storylab.cli.registry import Call, Verb
from storylab.errors import UserError

if TYPE_CHECKING:
    from storylab.execution.job import Executor
    from storylab.experiments.outcome import Outcome


@dataclass(frozen=True)
class ExperimentRunCommand(ExperimentFlags):
    """Run an experiment file: every arm with every seed, then the comparison and the report.

    Finished runs are not trained again, and a stopped experiment continues where it stopped. With more
    seeds than the first planned look needs, arms are judged at every look on the way, and those that are
    settled stop there.

    Examples: storylab experiment run experiments/04-sliding-window.toml --scale laptop
    | storylab experiment run mine.toml --seeds 8 --only full --dry_run
    """

    seeds: int | None = None
    """Number of seeds, trained look by look; by default those that the file lists."""
    only: tuple[str, ...] = ()
    """Run these arms only."""
    fresh: bool = False
    """Train everything again; earlier runs are set aside, not deleted."""


def run(call: Call) -> int:
    """Run the experiment: train its arms, compare them and write the report."""
    command = call.parse(ExperimentRunCommand)
    require_document(command.json, command.dry_run, command.register)
    executor = tracking(chosen_executor(call.executor, command), command.track)
    with remarks_on_stderr(command.json):
        outcome, states = _results(command, executor)
    if outcome is None:
        return 0
    return closing_code(outcome, states, command.exit_code, command.json)


def _results(command: ExperimentRunCommand, executor: Executor) -> tuple[Outcome | None, list[str]]:
    """The outcome, None for a plan alone, and the states of the runs."""
    from storylab.experiments.spec import load_experiment

    if command.register and (command.fresh or command.track):
        raise UserError("--register trains nothing here: leave out --fresh and --track")
    experiment = load_experiment(command.file, command.scale)
    seeds = experiment.first_seeds(command.seeds)
    dataset, planned = prepare_and_plan(
        experiment, command.data_dir, command.runs, seeds, command.only
    )
    if command.dry_run:
        print_plan(experiment, dataset, planned, command.runs, executor, command.fresh)
        return None, []
    if command.register:
        register_for_workers(experiment, dataset, planned, command.runs)
        return None, []
    record, states = train_planned(
        experiment, dataset, planned, command.runs, executor, command.fresh
    )
    return print_results(record, command.runs, planned[0].cache), states


VERB = Verb(
    "experiment run",
    "train the arms of an experiment and compare them",
    "experiments",
    run,
    ExperimentRunCommand,
    operand="FILE",
    position=1,
)
