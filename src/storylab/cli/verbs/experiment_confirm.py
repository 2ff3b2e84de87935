"""``storylab experiment confirm``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from storylab.cli.arguments import ExperimentFlags
from storylab.cli.documents import remarks_on_stderr
from storylab.cli.experiments import (
    chosen_executor,
    closing_code,
    open_data,
    print_plan,
    print_results,
    register_for_workers,
    require_document,
    tracking,
    train_planned,
)
from storylab.cli.registry import Call, Verb

if TYPE_CHECKING:
    from storylab.execution.job import Executor
    from storylab.experiments.outcome import Outcome


@dataclass(frozen=True)
class ExperimentConfirmCommand(ExperimentFlags):
    """Confirm arms of an experiment: train them and the baseline with seeds that no run in the folder has
    used with this data, and judge them once, on the test split.

    The first call fixes the seeds; the same command later goes on with them. The record notes every time
    that losses on the test split are shown.

    Examples: storylab experiment confirm mine.toml --only 3e-3
    | storylab experiment confirm mine.toml --only 3e-3 --seeds 8
    """

    only: tuple[str, ...] = ()
    """Arms to confirm; by default those of an earlier call, or the only one besides the baseline."""
    seeds: int | None = None
    """Number of seeds, at least 5; by default 5, or as many as an earlier call had."""


def run(call: Call) -> int:
    """Train the arms with fresh seeds, and compare them on the test split."""
    command = call.parse(ExperimentConfirmCommand)
    require_document(command.json, command.dry_run, command.register)
    executor = tracking(chosen_executor(call.executor, command), command.track)
    with remarks_on_stderr(command.json):
        outcome, states = _results(command, executor)
    if outcome is None:
        return 0
    return closing_code(outcome, states, command.exit_code, command.json)


def _results(
    command: ExperimentConfirmCommand, executor: Executor
) -> tuple[Outcome | None, list[str]]:
    """The outcome, None for a plan alone, and the states of the runs."""
    from storylab.experiments.confirm import confirmation, note_opening, openings_line
    from storylab.experiments.foresight import expected_spread
    from storylab.experiments.outcome import load_outcome
    from storylab.experiments.plan import plan_runs
    from storylab.experiments.records import FolderCache
    from storylab.experiments.selection import selection_line, selection_on
    from storylab.experiments.spec import load_experiment

    search, cache = load_experiment(command.file, command.scale), FolderCache()
    dataset, runs = open_data(search, command.data_dir), command.runs
    experiment = confirmation(search, dataset, runs, command.only, command.seeds, cache)
    planned = plan_runs(experiment, dataset, runs, cache=cache)
    spread = expected_spread(search, dataset.fingerprint, runs, cache).nats
    print(selection_line(selection_on(runs, dataset.fingerprint, cache), spread))
    print(f"Seeds for the confirmation alone: {', '.join(map(str, experiment.seeds))}")
    if command.dry_run:
        print_plan(experiment, dataset, planned, runs, executor)
        return None, []
    if command.register:
        register_for_workers(experiment, dataset, planned, runs)
        return None, []
    record, states = train_planned(experiment, dataset, planned, runs, executor)
    if "finished" not in states:
        return load_outcome(record, cache), states
    before = note_opening(record, len(experiment.seeds), dataset.fingerprint, cache)
    print(openings_line(before))
    return print_results(record, runs, cache), states


VERB = Verb(
    "experiment confirm",
    "judge chosen arms on fresh seeds and the test split",
    "experiments",
    run,
    ExperimentConfirmCommand,
    operand="FILE",
    position=3,
)
