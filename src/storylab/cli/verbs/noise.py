"""``storylab noise``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from storylab.cli.arguments import DEFAULT_RUNS_DIR
from storylab.cli.registry import Call, Verb
from storylab.errors import UserError

if TYPE_CHECKING:
    from storylab.execution.job import Executor
    from storylab.experiments.plan import PlannedRun
    from storylab.record.run import Run


@dataclass(frozen=True)
class NoiseCommand:
    """Measure how much the final loss changes with the seed alone, and what pairs of seeds could see.

    Given a run, this noise floor comes from runs of the same recipe with other seeds in the same
    folder, and the spread of differences paired by seed from recipes of that folder that differ in one
    factor. Given an experiment file, its baseline is trained with --seeds seeds first. `storylab
    compare` finds the floor by itself.

    Examples: storylab noise runs/nano-7df279b362-s1337 | storylab noise mine.toml --seeds 8
    """

    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FILE")]
    """Run folder or experiment file."""
    seeds: int = 5
    """Number of seeds to train of a file's baseline."""
    scale: str | None = None
    """One of the file's scales."""
    runs: Path = DEFAULT_RUNS_DIR
    """Folder that holds the run folders."""
    data_dir: Path | None = None
    """Prepared data set; by default the one that the file's [data] describes."""


def run(call: Call) -> int:
    """Print the seed noise of a run, or of the baseline of a file."""
    command = call.parse(NoiseCommand)
    from storylab.record.run import load_run

    if command.target.suffix != ".toml":
        _print_noise("", load_run(command.target))
        return 0
    for run in _trained_baseline(command, call.executor):
        _print_noise(run.cell.condition, load_run(run.folder))
    return 0


def _trained_baseline(command: NoiseCommand, executor: Executor) -> list[PlannedRun]:
    """One run of a file's baseline under every condition, after training all its seeds."""
    from storylab.cli.experiments import prepare_and_plan, train_planned
    from storylab.experiments.spec import load_experiment

    experiment = load_experiment(command.target, command.scale)
    seeds = experiment.first_seeds(max(command.seeds, 2))
    only = (experiment.baseline,)
    dataset, planned = prepare_and_plan(experiment, command.data_dir, command.runs, seeds, only)
    train_planned(experiment, dataset, planned, command.runs, executor)
    return list({run.cell.condition: run for run in planned}.values())


def _print_noise(condition: str, result: Run) -> None:
    """Print the standard deviation over the seeds of a run's config, and the smallest
    differences that pairs of seeds could see.

    Raises:
        UserError: no other seed of it has finished.
    """
    from storylab.experiments.noise import noise_of, other_seeds, paired_spreads, seen_by_pairs
    from storylab.experiments.statistics import deviation_interval

    runs, problems = other_seeds(result)
    for problem in problems:
        print(f"left out: {problem}")
    floor = noise_of(runs)
    if floor is None:
        raise UserError(
            f"{result.folder} has no finished runs with other seeds in its folder: train some with "
            "`storylab noise FILE --seeds 5`"
        )
    low, high = deviation_interval(floor.standard_deviation, floor.seeds)
    tokens = result.config.total_tokens
    print(
        f"{condition + ': ' if condition else ''}seed noise of {result.config.preset}, "
        f"{tokens:,} tokens: standard deviation "
        f"{floor.standard_deviation:.4f} nats (95 % CI {low:.4f} to {high:.4f}; "
        f"{floor.seeds} seeds)"
    )
    for line in seen_by_pairs(floor, paired_spreads(runs)):
        print(line)


VERB = Verb(
    "noise", "measure how much the loss changes with the seed alone", "experiments", run, position=7
)
