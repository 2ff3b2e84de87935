"""Types and defaults of arguments that several verbs have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from storylab.errors import UserError
from storylab.execution.executors import EXECUTORS
from storylab.files import exists, reading
from storylab.tracking import TRACKERS

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
OptionalRunFolder = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
RunFolders = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
ExperimentFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
AsJson = Annotated[bool, tyro.conf.arg(help="Print one JSON document (docs/guide/json.md).")]
ExitByVerdict = Annotated[
    bool,
    tyro.conf.arg(help="Exit with a code that says the verdict (docs/guide/command-line.md)."),
]
# The names are those of the entries, so that a new one is named in one place.
if TYPE_CHECKING:
    TrackerName = str
    ExecutorName = str
else:
    TrackerName = Literal[tuple(TRACKERS)]
    ExecutorName = Literal[tuple(EXECUTORS)]
Track = Annotated[
    tuple[TrackerName, ...],
    tyro.conf.arg(help="Show the run in these trackers, too (docs/guide/trackers.md)."),
]
# The three flags of an executor (docs/guide/machines.md).
Jobs = Annotated[
    int | None,
    tyro.conf.arg(help="Runs at the same time; by default 1 here, and what fits on a cluster."),
]
ExecutorChoice = Annotated[
    ExecutorName, tyro.conf.arg(help="Where runs are trained (docs/guide/machines.md).")
]
ExecutorOptions = Annotated[
    tuple[str, ...],
    tyro.conf.arg(help="Options of the executor as KEY=VALUE (docs/guide/machines.md)."),
]
CheckpointName = Literal["last", "best"]
DEFAULT_RUNS_DIR = Path("runs")


@dataclass(frozen=True)
class ExperimentFlags:
    """The flags that `experiment run` and `experiment confirm` share."""

    file: ExperimentFile
    """Experiment file (TOML)."""
    scale: str | None = None
    """One of the file's scales; by default laptop if the file has it, else the first."""
    dry_run: bool = False
    """Show the plan, with expected time and memory from a short calibration and the differences that it can
    see, and stop."""
    register: bool = False
    """Register the plan for `storylab work RUNS`, and train nothing here."""
    runs: Path = DEFAULT_RUNS_DIR
    """Folder that holds the run folders."""
    data_dir: Path | None = None
    """Prepared data set; by default the one that the file's [data] describes."""
    track: Track = ()
    jobs: Jobs = None
    executor: ExecutorChoice = "local"
    executor_options: ExecutorOptions = ()
    exit_code: ExitByVerdict = False
    json: AsJson = False


def require_runs_folder(runs: Path) -> None:
    """Raise a UserError if the value of --runs is not a folder."""
    with reading(runs):
        if not exists(runs) or not runs.is_dir():
            raise UserError(f"{runs} is not a folder: give the one with the runs as --runs")
