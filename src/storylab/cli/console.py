"""The terminal: log lines on standard output, progress bars on standard error."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from storylab.cli.tables import print_lines
from storylab.training.log_format import printable
from storylab.training.observers import Observer


class ConsoleReporter(Observer):
    """Prints lines to standard output, and bars with an ETA below them if standard error is a terminal.

    Args:
        count: show numbers next to a bar rather than a percentage.
    """

    def __init__(self, count: bool = True) -> None:
        # isatty as well: FORCE_COLOR makes rich take a file for a terminal.
        self._console = Console(file=sys.stderr)
        self._live = self._console.is_terminal and sys.stderr.isatty()
        amount = MofNCompleteColumn() if count else TaskProgressColumn()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            amount,
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
            speed_estimate_period=3600,  # an iteration may take minutes
            disable=not self._live,
        )
        self._overall: TaskID | None = None
        self._tasks: dict[str, TaskID] = {}
        self._shown = ""

    def line(self, text: str) -> None:
        """Print a line."""
        if self._live and sys.stdout.isatty():
            self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
        else:
            print_lines(text)

    def progress(self, name: str, done: int, total: int | None) -> None:
        """Show ``done`` of ``total`` parts of the work called ``name``; without a total, a moving bar."""
        if not self._live:
            return
        if name != self._shown:
            # One bar at a time; those hidden keep their clocks.
            for other, task in self._tasks.items():
                self._bar.update(task, visible=other == name)
            self._shown = name
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total)
        elif done == 0:
            self._bar.reset(self._tasks[name])
        self._bar.update(self._tasks[name], completed=done, total=total)

    def overall(self, name: str, done: float, total: float) -> None:
        """Show ``done`` of ``total`` tokens of the whole work, in thousands, on a bar above the others."""
        if not self._live:
            return
        if self._overall is None:
            self._overall = self._bar.add_task(name)
        self._bar.update(
            self._overall,
            description=name,
            completed=round(done / 1000),
            total=round(total / 1000),
        )

    def __enter__(self) -> ConsoleReporter:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
