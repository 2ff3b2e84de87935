"""Types and defaults of arguments that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from storylab.errors import UserError
from storylab.files import exists, reading

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
OptionalRunFolder = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
RunFolders = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
ExperimentFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
AsJson = Annotated[bool, tyro.conf.arg(help="Print one JSON document (docs/guide/json.md).")]
ExitByVerdict = Annotated[
    bool,
    tyro.conf.arg(help="Exit with a code that says the verdict (docs/guide/command-line.md)."),
]
CheckpointName = Literal["last", "best"]
DEFAULT_RUNS_DIR = Path("runs")


def require_runs_folder(runs: Path) -> None:
    """Raise a UserError if the value of --runs is not a folder."""
    with reading(runs):
        if not exists(runs) or not runs.is_dir():
            raise UserError(f"{runs} is not a folder: give the one with the runs as --runs")
