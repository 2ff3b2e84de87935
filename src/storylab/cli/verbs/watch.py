"""``storylab watch``."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storylab.cli.arguments import DEFAULT_RUNS_DIR, require_runs_folder
from storylab.cli.registry import MORE_MEMORY, Call, Verb


@dataclass(frozen=True)
class WatchCommand:
    """Watch the experiments in a folder as they run, from another terminal.

    Examples: storylab watch | storylab watch --runs runs --once
    """

    runs: Path = DEFAULT_RUNS_DIR
    """Folder that holds the run folders."""
    once: bool = False
    """Print the table once and stop; this is also done if standard output is no terminal."""


def run(call: Call) -> int:
    """Print the table of experiments, on a terminal again and again."""
    command = call.parse(WatchCommand)
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from storylab.cli.tables import make_table, print_lines, print_table
    from storylab.experiments.records import FolderCache
    from storylab.experiments.watching import WATCH_COLUMNS, watch_tables

    require_runs_folder(command.runs)
    if command.once or not sys.stdout.isatty():
        for table in watch_tables(command.runs):
            print_table(table.title, WATCH_COLUMNS, table.rows)
            if table.faults:
                print_lines(*table.faults)
        return 0
    cache = FolderCache()
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


VERB = Verb(
    "watch",
    "follow experiments while they run",
    "experiments",
    run,
    WatchCommand,
    position=9,
    memory_remedy=MORE_MEMORY,
)
