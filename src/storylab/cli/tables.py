"""Lines and tables on standard output. rich is imported for terminals and for wide tables alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len

from storylab.training.log_format import printable

if TYPE_CHECKING:
    from rich.table import Table

# Columns of an output that is no terminal.
WIDTH = 200


def print_lines(*lines: str) -> None:
    """Print lines on standard output at once, without control characters: names and texts from files may
    have some, and a terminal obeys them."""
    print(*map(printable, lines), sep="\n", flush=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on standard output; 200 columns wide if that is no terminal."""
    cells = [[*map(_printable, row)] for row in rows]
    lines = _table_lines(columns, cells)
    if not sys.stdout.isatty() and cell_len(lines[1]) <= WIDTH:
        sys.stdout.write("\n".join([_printable(title), "", *lines, "", ""]))
    else:
        _print_rich(title, columns, cells, lines)


def _print_rich(
    title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], lines: Sequence[str]
) -> None:
    """Print a table with its heading in bold, or with folded cells where ``lines`` are too wide."""
    # Most of the time of a short command, and nothing else needs it.
    from rich.console import Console
    from rich.text import Text

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else WIDTH, highlight=False, no_color=not terminal)
    if cell_len(lines[1]) > console.width:
        console.print(make_table(title, columns, cells))  # slow
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
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

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
