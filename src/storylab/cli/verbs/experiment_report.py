"""``storylab experiment report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from storylab.cli.arguments import DEFAULT_RUNS_DIR
from storylab.cli.registry import Call, Verb


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


def run(call: Call) -> int:
    """Write the report."""
    command = call.parse(ExperimentReportCommand)
    from storylab.cli.tables import print_lines
    from storylab.reporting.report import write_report

    folder = write_report(command.runs, command.out or command.runs / "report")
    print_lines(f"Report: {folder / 'EXPERIMENTS.md'} and {folder / 'index.html'}")
    return 0


VERB = Verb(
    "experiment report",
    "write the log and the page of all experiments",
    "experiments",
    run,
    ExperimentReportCommand,
    position=3,
)
