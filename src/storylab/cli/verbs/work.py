"""``storylab work``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from storylab.cli.arguments import Track, require_runs_folder
from storylab.cli.registry import MORE_MEMORY, Call, Verb

if TYPE_CHECKING:
    from storylab.experiments.work import WorkDone

RunsFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]


@dataclass(frozen=True)
class WorkCommand:
    """Train runs of the experiments that are registered in a folder, together with other workers on any
    machines that see the folder.

    A worker trains one run after the other, judges a look when all of its runs have ended, and ends when no
    run needs it any more. Start one for each GPU. If a worker is killed, another goes on with its run.

    Examples: storylab experiment run mine.toml --register --runs /shared/runs
    | storylab work /shared/runs
    | storylab work /shared/runs --data_dir /local/tinystories
    """

    runs: RunsFolder
    """Folder that holds the run folders."""
    data_dir: tuple[Path, ...] = ()
    """Prepared data sets, where they are not at the places that the records name."""
    any_machine: bool = False
    """Train seeds that were begun on another kind of machine, too; speeds cannot be compared then."""
    retry: bool = False
    """Train runs that failed again, once."""
    track: Track = ()


def run(call: Call) -> int:
    """Train runs until none needs this worker."""
    command = call.parse(WorkCommand)
    from storylab.cli.console import ConsoleReporter
    from storylab.cli.experiments import resumable, tracking
    from storylab.experiments.work import WorkOptions, work

    require_runs_folder(command.runs)
    executor = tracking(call.executor, command.track)
    options = WorkOptions(command.data_dir, command.any_machine, command.retry)
    with resumable(), ConsoleReporter() as reporter:
        done = work(command.runs, executor, reporter, options)
    return _report(done, command.runs)


def _report(done: WorkDone, runs: Path) -> int:
    """Print the result of a worker; returns the exit code: 1 if it gave up or could train nothing."""
    for name, reason in done.refused.items():
        print(f"{name} cannot be trained here: {reason}")
    for label, machine in done.elsewhere.items():
        print(f"{label} is left to a machine like {machine}; --any_machine trains it here")
    if done.gave_up:
        print(
            "The last runs failed one after the other, so this machine may be at fault: see info RUN"
        )
        return 1
    print(
        f"This worker trained {done.trained} runs. `storylab experiment report --runs {runs}` writes the "
        "report"
    )
    return 1 if done.refused and not done.trained else 0


VERB = Verb(
    "work",
    "train registered experiments, with workers on any machines",
    "experiments",
    run,
    WorkCommand,
    operand="RUNS",
    position=8,
    memory_remedy=MORE_MEMORY,
)
