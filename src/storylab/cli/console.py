"""The terminal: log lines on standard output, progress bars on standard error, tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
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
from rich.table import Table
from rich.text import Text

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


def print_lines(*lines: str) -> None:
    """Print lines on standard output at once, without control characters: names and texts from files may
    have some, and a terminal obeys them."""
    print(*map(printable, lines), sep="\n", flush=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on standard output; 200 columns wide if that is no terminal."""
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 200, highlight=False, no_color=not terminal)
    cells = [[*map(_printable, row)] for row in rows]
    lines = _table_lines(columns, cells)
    if cell_len(lines[1]) > console.width:
        console.print(make_table(title, columns, cells))  # which folds cells, slowly
        return
    console.print(Text(_printable(title)))
    console.print(Text(f"\n{lines[0]}", style="bold"))
    sys.stdout.write("\n".join([*lines[1:], "", ""]))


def _table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Heading, rule and rows of a table in as much width as its cells take."""
    heading = [name.strip() for name in columns]
    widths = [max(map(cell_len, column)) for column in zip(heading, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = []
        for cell, name, width in zip(row, columns, widths, strict=True):
            space = " " * (width - cell_len(cell))
            cells.append(space + cell if name.endswith(" ") else cell + space)
        return f" {'   '.join(cells)}".rstrip()

    rule = "\u2500" * (sum(widths) + 3 * (len(widths) - 1))
    return [line(heading), f" {rule}", *map(line, rows)]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def make_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table. A heading that ends with a space marks a column of numbers, which is aligned right."""
    table = Table(
        title=Text(_printable(title)), title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in columns:
        table.add_column(
            name.strip(), justify="right" if name.endswith(" ") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(escape(_printable(cell)) for cell in row))
    return table
