"""The verbs about many runs: experiment, compare, noise, list, watch."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from storylab.errors import UserError
from storylab.flags import parse

if TYPE_CHECKING:
    from storylab.console import ConsoleReporter
    from storylab.data.dataset import Dataset
    from storylab.experiments.runner import PlannedRun
    from storylab.experiments.spec import Experiment

DEFAULT_RUNS_DIR = Path("runs")
ExperimentFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
RunFolders = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True)
class ExperimentRunCommand:
    """Run an experiment file: every arm with every seed, then the comparison and the report.

    What is finished is not run again, and a stopped experiment goes on where it was.

    Examples: storylab experiment run experiments/04-sliding-window.toml --scale laptop
    | storylab experiment run mine.toml --seeds 5 --only full --dry_run
    """

    file: ExperimentFile
    """Experiment file (TOML)."""
    scale: str | None = None
    """One of the file's scales; by default laptop where there is one, else the first."""
    seeds: int | None = None
    """How many seeds; by default those that the file lists."""
    only: tuple[str, ...] = ()
    """Run these arms only."""
    dry_run: bool = False
    """Show the plan, with expected time and memory from a short calibration, and stop."""
    fresh: bool = False
    """Train everything anew; what is there is set aside, not deleted."""
    runs: Path = DEFAULT_RUNS_DIR
    """Folder that holds the run folders."""
    data_dir: Path | None = None
    """Prepared data set; by default the one that the file's [data] describes."""


@dataclass(frozen=True)
class ExperimentNewCommand:
    """Write the skeleton of an experiment file, which runs as it is.

    Examples: storylab experiment new mine.toml | storylab experiment new mine.toml --title "Decay"
    """

    file: ExperimentFile
    """File to write."""
    title: str = "My experiment"
    """Its title."""


@dataclass(frozen=True)
class ExperimentReportCommand:
    """Write EXPERIMENTS.md, the page index.html and the pictures from the run folders alone.

    Remarks that you write between the markers in EXPERIMENTS.md stay as they are.

    Examples: storylab experiment report | storylab experiment report --runs runs --out docs/results
    """

    runs: Path = DEFAULT_RUNS_DIR
    """Folder that holds the run folders."""
    out: Path | None = None
    """Folder to write; by default RUNS/report."""


@dataclass(frozen=True)
class CompareCommand:
    """Compare runs: the first one's recipe is the baseline; runs that differ in the seed alone are
    one arm.

    Examples: storylab compare runs/a runs/b | storylab compare runs/a-s1 runs/a-s2 runs/b-s1 runs/b-s2
    """

    runs: RunFolders
    """Run folders, two or more."""
    margin: float | None = None
    """The difference in nats that counts as none: asks whether the arms are equivalent."""


@dataclass(frozen=True)
class NoiseCommand:
    """How much the final loss moves with the seed alone: the floor below which nothing can be told.

    Given a run, from the seeds of its recipe that lie beside it; given an experiment file, its
    baseline is trained with --seeds seeds first. `storylab compare` finds the floor by itself.

    Examples: storylab noise runs/nano-7df279b362-s1337 | storylab noise mine.toml --seeds 8
    """

    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FILE")]
    """Run folder or experiment file."""
    seeds: int = 5
    """How many seeds of a file's baseline."""
    scale: str | None = None
    """One of the file's scales."""
    runs: Path = DEFAULT_RUNS_DIR
    """Folder that holds the run folders."""
    data_dir: Path | None = None
    """Prepared data set; by default the one that the file's [data] describes."""


@dataclass(frozen=True)
class ListCommand:
    """List the runs in a folder.

    Examples: storylab list | storylab list --status finished --contains nano --sort loss
    """

    runs: Path = DEFAULT_RUNS_DIR
    """Folder that holds the run folders."""
    status: Literal["any", "finished", "diverged", "failed", "unfinished", "damaged"] = "any"
    """Only runs in this state."""
    contains: str = ""
    """Only runs with this in their name."""
    sort: Literal["name", "loss", "speed", "started"] = "name"
    """Order of the table."""


@dataclass(frozen=True)
class WatchCommand:
    """Watch the experiments in a folder as they run, from another terminal.

    Examples: storylab watch | storylab watch --runs runs --once
    """

    runs: Path = DEFAULT_RUNS_DIR
    """Folder that holds the run folders."""
    once: bool = False
    """Print the table once and stop, as it does where there is no terminal."""


def experiment(args: list[str]) -> int:
    """``storylab experiment run|new|report``."""
    verbs = {"run": _run, "new": _new, "report": _report}
    if args and args[0] in ("-h", "--help"):
        print("usage: storylab experiment run|new|report (each has --help)")
        return 0
    if not args or args[0] not in verbs:
        unknown = f"there is no '{args[0]}': " if args else ""
        raise UserError(f"{unknown}say what to do: storylab experiment {', '.join(verbs)}")
    return verbs[args[0]](args[1:])


def _new(args: list[str]) -> int:
    command = parse(ExperimentNewCommand, args, "storylab experiment new")
    from storylab.experiments.spec import skeleton
    from storylab.files import exists, write_text

    if exists(command.file):
        raise UserError(f"{command.file} exists already: choose another name")
    write_text(command.file, skeleton(command.title))
    print(
        f"{command.file}: change it, then: storylab experiment run {shlex.quote(str(command.file))}"
    )
    return 0


def _run(args: list[str]) -> int:
    command = parse(ExperimentRunCommand, args, "storylab experiment run")
    from storylab.experiments.spec import load_experiment

    experiment = load_experiment(command.file, command.scale)
    seeds = experiment.first_seeds(command.seeds)
    dataset, planned = _plan(experiment, command.data_dir, command.runs, seeds, command.only)
    if command.dry_run:
        with _interruptible(), _reporter() as reporter:
            for line in plan_lines(experiment, planned, reporter, command.fresh):
                reporter.line(line)
        return 0
    record, states = _train(experiment, dataset, planned, command.runs, command.fresh)
    from storylab.experiments.outcome import load_outcome
    from storylab.experiments.verdicts import verdict_line
    from storylab.reporting.report import write_report

    cache = planned[0].cache
    outcome = load_outcome(record, cache)
    print()
    for comparison in outcome.comparisons:
        print(verdict_line(comparison))
    for problem in outcome.problems:
        print(f"not in the comparison: {problem}")
    folder = write_report(command.runs, command.runs / "report", cache, {record: outcome})
    print(f"\nReport: {folder / 'EXPERIMENTS.md'} and {folder / 'index.html'}")
    return 0 if "finished" in states else 1


def _plan(
    experiment: Experiment,
    data_dir: Path | None,
    runs: Path,
    seeds: Sequence[int],
    only: Sequence[str] = (),
) -> tuple[Dataset, list[PlannedRun]]:
    """The runs of an experiment with its data set, prepared if need be."""
    from storylab.console import ConsoleReporter
    from storylab.data.dataset import load_dataset
    from storylab.data.prepare import prepare
    from storylab.experiments import runner

    runner.require_runnable(experiment)
    if data_dir is not None:
        dataset = load_dataset(data_dir)
    else:
        with ConsoleReporter(count=False) as reporter:
            if not experiment.data.folder.exists():
                reporter.line(f"Preparing {experiment.data.folder}")
            try:
                dataset = prepare(experiment.data, reporter.progress)
            except UserError as error:
                message = str(error).replace("--out", 'out = "FOLDER" in [data]')
                raise UserError(message) from error
    return dataset, runner.plan(experiment, dataset, runs, seeds, only)


def _train(
    experiment: Experiment,
    dataset: Dataset,
    planned: Sequence[PlannedRun],
    runs: Path,
    fresh: bool = False,
) -> tuple[Path, list[str]]:
    """Show the plan, carry it out, and write which runs make up the experiment."""
    from storylab.experiments import runner
    from storylab.record.run import ENDED

    with _interruptible(fresh), _reporter() as reporter:
        if fresh or any(run.state not in ENDED for run in planned):
            for line in plan_lines(experiment, planned, reporter, fresh):
                reporter.line(line)
        record = runner.write_record(experiment, dataset, planned, runs)
        return record, runner.run_experiment(planned, reporter, fresh)


@contextmanager
def _interruptible(fresh: bool = False) -> Iterator[None]:
    """Leave with one line and the signal's exit code when a signal stops the work."""
    from storylab.training.loop import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as stop:
        same = "the same command without --fresh" if fresh else "the same command"
        print(f"storylab: {stop}; {same} goes on from there", file=sys.stderr)
        raise SystemExit(128 + stop.signal_number) from None


def _reporter() -> ConsoleReporter:
    from storylab.console import ConsoleReporter

    return ConsoleReporter()


def plan_lines(
    experiment: Experiment,
    planned: Sequence[PlannedRun],
    reporter: ConsoleReporter,
    fresh: bool = False,
) -> Iterator[str]:
    """The plan of an experiment: its runs, with what they are expected to take."""
    from storylab.experiments.runner import estimates
    from storylab.record.run import ENDED
    from storylab.training.cores import SOME_CORES
    from storylab.training.lines import duration

    rows, left, others = [], {}, 0.0
    for number, (run, estimate) in enumerate(estimates(planned)):
        reporter.progress("calibrating", number, len(planned))
        state = "again" if fresh and run.state != "new" else run.state
        told = f"{'cannot be calibrated':>35}"
        if estimate is not None:
            if state not in ENDED:
                left[run.folder] = estimate.seconds  # once, however many cells share the run
            others = max(others, estimate.other_cores)
            kind = "as before" if estimate.measured else "predicted"
            memory = f"{estimate.memory_bytes / 1e9:6.2f} GB"
            told = f"{duration(estimate.seconds):>12}  {memory}  {kind:<9}"
        tokens = (run.config.max_iters + 1) * run.config.tokens_per_iteration
        rows.append(f"  {run.label:<44} {tokens:>13,} tokens  {told}  {state}")
    yield (
        f"Plan: {experiment.title}{f', scale {experiment.scale}' if experiment.scale else ''}: "
        f"{len(planned)} runs, about {duration(sum(left.values()))} to go (as a like run took before, or "
        "predicted by a calibration of seconds)"
    )
    yield from rows
    if others >= SOME_CORES:
        yield (
            f"Other programs used up to {others:.1f} of {os.cpu_count()} cores during the calibrations: "
            "the runs are faster without them"
        )


def _report(args: list[str]) -> int:
    command = parse(ExperimentReportCommand, args, "storylab experiment report")
    from storylab.reporting.report import write_report

    folder = write_report(command.runs, command.out or command.runs / "report")
    print(f"Report: {folder / 'EXPERIMENTS.md'} and {folder / 'index.html'}")
    return 0


def compare(args: list[str]) -> int:
    """``storylab compare``."""
    command = parse(CompareCommand, args, "storylab compare")
    from storylab.experiments.comparison import compare_runs
    from storylab.experiments.verdicts import detail_lines, verdict_line
    from storylab.record.run import load_run

    if command.margin is not None and not 0 < command.margin < float("inf"):
        raise UserError(f"margin is {command.margin}: it must be a finite number above 0")
    folders = [Path(os.path.realpath(folder)) for folder in command.runs]
    for folder, resolved in zip(command.runs, folders, strict=True):
        if folders.count(resolved) > 1:
            raise UserError(f"{folder} is given twice: a run counts once")
    if len(folders) < 2:
        raise UserError("give two runs or more: storylab compare RUN RUN...")
    # Without the first there is no baseline.
    results, faults = [load_run(command.runs[0])], []
    for folder in command.runs[1:]:
        try:
            results.append(load_run(folder))
        except UserError as error:
            faults.append(str(error))
    if len(results) < 2:
        raise UserError("; ".join(faults))
    comparisons = compare_runs(results, command.margin)
    if not comparisons:
        raise UserError(
            "these runs differ in their seeds alone: that is noise, not a comparison; see "
            f"`storylab noise {command.runs[0]}`"
        )
    for comparison in comparisons:
        print(verdict_line(comparison))
        for line in detail_lines(comparison):
            print(f"  {line}")
    if faults:
        raise UserError(f"left out: {'; '.join(faults)}")
    return 0


def noise(args: list[str]) -> int:
    """``storylab noise``."""
    command = parse(NoiseCommand, args, "storylab noise")
    from storylab.experiments.comparison import noise_of, other_seeds
    from storylab.experiments.spec import load_experiment
    from storylab.experiments.statistics import detectable_difference, deviation_interval
    from storylab.record.run import load_run

    if command.target.suffix != ".toml":
        found = {"": load_run(command.target)}
    else:
        experiment = load_experiment(command.target, command.scale)
        seeds = experiment.first_seeds(max(command.seeds, 2))
        only = (experiment.baseline,)
        dataset, planned = _plan(experiment, command.data_dir, command.runs, seeds, only)
        _train(experiment, dataset, planned, command.runs)
        found = {run.cell.condition: load_run(run.folder) for run in planned}
    for condition, result in found.items():
        alike, problems = other_seeds(result)
        for problem in problems:
            print(f"left out: {problem}")
        floor = noise_of(alike)
        if floor is None:
            raise UserError(
                f"{result.folder} has no finished runs of other seeds beside it: train some with "
                "`storylab noise FILE --seeds 5`"
            )
        low, high = deviation_interval(floor.standard_deviation, floor.seeds)
        tokens = (result.config.max_iters + 1) * result.config.tokens_per_iteration
        print(
            f"{condition + ': ' if condition else ''}seed noise of {result.config.preset}, "
            f"{tokens:,} tokens: standard deviation "
            f"{floor.standard_deviation:.4f} nats (95 % CI {low:.4f} to {high:.4f}; "
            f"{floor.seeds} seeds)"
        )
        spread = 2**0.5 * floor.standard_deviation
        for pairs in (3, 5, 10):
            print(f"  {pairs} pairs of seeds could see {detectable_difference(spread, pairs):.4f}")
    return 0


def list_runs(args: list[str]) -> int:
    """``storylab list``."""
    command = parse(ListCommand, args, "storylab list")
    from storylab.console import print_table
    from storylab.experiments.listing import LIST_COLUMNS, list_cells
    from storylab.record.index import list_runs as entries

    _require_folder(command.runs)
    rows = [
        row
        for row in entries(command.runs)
        if command.status in ("any", row.state) and command.contains in row.name
    ]
    keys: dict[str, Any] = {
        "name": lambda row: row.name,
        "loss": lambda row: (row.loss is None, row.loss),
        "speed": lambda row: -(row.speed or 0.0),
        "started": lambda row: row.started,
    }
    rows.sort(key=keys[command.sort])
    print_table(f"{len(rows)} runs in {command.runs}", LIST_COLUMNS, list(map(list_cells, rows)))
    for row in rows:
        if row.fault:
            print(row.fault)
    return 0


def _require_folder(runs: Path) -> None:
    from storylab.files import exists, reading

    with reading(runs):
        if not exists(runs) or not runs.is_dir():
            raise UserError(f"{runs} is not a folder: give the one with the runs as --runs")


def watch(args: list[str]) -> int:
    """``storylab watch``."""
    command = parse(WatchCommand, args, "storylab watch")
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from storylab.console import make_table, print_table
    from storylab.experiments.watching import WATCH_COLUMNS, watch_tables
    from storylab.record.index import RunCache

    _require_folder(command.runs)
    if command.once or not sys.stdout.isatty():
        for table in watch_tables(command.runs):
            print_table(table.title, WATCH_COLUMNS, table.rows)
            print(*table.faults, sep="\n", end="\n" * bool(table.faults))
        return 0
    cache = RunCache()
    with Live(auto_refresh=False) as live:
        while True:
            parts: list[Any] = [
                part
                for table in watch_tables(command.runs, cache)
                for part in (
                    make_table(table.title, WATCH_COLUMNS, table.rows),
                    *map(Text, table.faults),
                )
            ]
            live.update(Group(*parts), refresh=True)
            time.sleep(2)
