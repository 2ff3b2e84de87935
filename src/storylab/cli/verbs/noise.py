"""``storylab noise``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from storylab.cli.arguments import (
    DEFAULT_RUNS_DIR,
    AsJson,
    ExecutorChoice,
    ExecutorOptions,
    Jobs,
)
from storylab.cli.documents import print_document
from storylab.cli.registry import Call, Verb
from storylab.documents.noise import Detectable, NoiseDocument, NoiseFloor
from storylab.errors import UserError

if TYPE_CHECKING:
    from storylab.execution.job import Executor
    from storylab.experiments.comparison import Noise
    from storylab.experiments.noise import PairedSpread
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
    jobs: Jobs = None
    executor: ExecutorChoice = "local"
    executor_options: ExecutorOptions = ()
    json: AsJson = False


def run(call: Call) -> int:
    """Print the seed noise of a run, or of the baseline of a file."""
    command = call.parse(NoiseCommand)
    from storylab.cli.tables import print_lines

    if command.json:
        print_document(
            lambda: NoiseDocument(floors=[floor for floor, _ in _floors(command, call.executor)])
        )
        return 0
    for floor, sight in _floors(command, call.executor):
        _print_floor(floor)
        print_lines(*sight)
    return 0


def _floors(command: NoiseCommand, executor: Executor) -> Iterator[tuple[NoiseFloor, list[str]]]:
    """The seed noise of the run, or of the baseline under every condition of the file; see
    :func:`_measured`."""
    from storylab.record.run import load_run

    if command.target.suffix != ".toml":
        yield _measured("", load_run(command.target))
        return
    for run in _trained_baseline(command, executor):
        yield _measured(run.cell.condition, load_run(run.folder))


def _trained_baseline(command: NoiseCommand, executor: Executor) -> list[PlannedRun]:
    """One run of a file's baseline under every condition, after training all its seeds."""
    from storylab.cli.experiments import chosen_executor, prepare_and_plan, train_planned
    from storylab.experiments.spec import load_experiment

    experiment = load_experiment(command.target, command.scale)
    seeds = experiment.first_seeds(max(command.seeds, 2))
    only = (experiment.baseline,)
    dataset, planned = prepare_and_plan(experiment, command.data_dir, command.runs, seeds, only)
    chosen = chosen_executor(executor, command)
    train_planned(experiment, dataset, planned, command.runs, chosen)
    return list({run.cell.condition: run for run in planned}.values())


def _measured(condition: str, result: Run) -> tuple[NoiseFloor, list[str]]:
    """The spread over the seeds of a run's config with the smallest detectable differences, and lines on
    the latter.

    Raises:
        UserError: no other seed of it has finished.
    """
    from storylab.cli.tables import print_lines
    from storylab.experiments.noise import noise_of, other_seeds, paired_spreads, seen_by_pairs

    runs, problems = other_seeds(result)
    noise = noise_of(runs)
    if noise is None:
        for problem in problems:
            print_lines(f"left out: {problem}")
        raise UserError(
            f"{result.folder} has no finished runs with other seeds in its folder: train some with "
            "`storylab noise FILE --seeds 5`"
        )
    spreads = paired_spreads(runs)
    floor = _floor(condition, result, noise, spreads, problems)
    return floor, seen_by_pairs(noise, spreads)


def _floor(
    condition: str, result: Run, noise: Noise, spreads: list[PairedSpread], problems: list[str]
) -> NoiseFloor:
    """The document of one recipe's noise."""
    from storylab.experiments.noise import PLANNED_PAIRS, typical_spread
    from storylab.experiments.statistics import LEVEL, detectable_difference, deviation_interval

    low, high = deviation_interval(noise.standard_deviation, noise.seeds)
    spread = typical_spread(noise, spreads)
    return NoiseFloor(
        condition=condition or None,
        run=str(result.folder),
        preset=result.config.preset,
        tokens=result.config.total_tokens,
        seeds=noise.seeds,
        standard_deviation_nats_per_token=noise.standard_deviation,
        low_nats_per_token=low,
        high_nats_per_token=high,
        level=LEVEL,
        like_recipes=len(spreads),
        paired_standard_deviation_nats_per_token=spread,
        detectable=[
            Detectable(pairs=pairs, difference_nats_per_token=detectable_difference(spread, pairs))
            for pairs in PLANNED_PAIRS
        ],
        left_out=problems,
    )


def _print_floor(floor: NoiseFloor) -> None:
    from storylab.cli.tables import print_lines

    for problem in floor.left_out:
        print_lines(f"left out: {problem}")
    print(
        f"{floor.condition + ': ' if floor.condition else ''}seed noise of {floor.preset}, "
        f"{floor.tokens:,} tokens: standard deviation "
        f"{floor.standard_deviation_nats_per_token:.4f} nats ({100 * floor.level:g} % CI "
        f"{floor.low_nats_per_token:.4f} to {floor.high_nats_per_token:.4f}; {floor.seeds} seeds)"
    )


VERB = Verb(
    "noise",
    "measure how much the loss changes with the seed alone",
    "experiments",
    run,
    NoiseCommand,
    position=7,
)
