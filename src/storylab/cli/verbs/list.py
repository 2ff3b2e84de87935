"""``storylab list``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from storylab.cli.arguments import DEFAULT_RUNS_DIR, AsJson, require_runs_folder
from storylab.cli.documents import print_document
from storylab.cli.registry import MORE_MEMORY, Call, Verb


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
    """Only runs whose name contains this text."""
    sort: Literal["name", "loss", "speed", "started"] = "name"
    """Order of the table."""
    json: AsJson = False


def run(call: Call) -> int:
    """Print a table of runs."""
    command = call.parse(ListCommand)
    from storylab.cli.tables import print_lines, print_table
    from storylab.experiments.listing import LIST_COLUMNS, list_cells, listed
    from storylab.record.index import list_runs

    require_runs_folder(command.runs)
    rows = [
        row
        for row in list_runs(command.runs)
        if command.status in ("any", row.state) and command.contains in row.name
    ]
    keys: dict[str, Any] = {
        "name": lambda row: row.name,
        "loss": lambda row: (row.loss is None, row.loss),
        "speed": lambda row: -(row.speed or 0.0),
        "started": lambda row: row.started,
    }
    rows.sort(key=keys[command.sort])
    if command.json:
        from storylab.documents.list import ListDocument

        document = ListDocument(folder=str(command.runs), runs=list(map(listed, rows)))
        print_document(lambda: document)
        return 0
    print_table(f"{len(rows)} runs in {command.runs}", LIST_COLUMNS, list(map(list_cells, rows)))
    for row in rows:
        if row.fault:
            print_lines(row.fault)
    return 0


VERB = Verb(
    "list",
    "list the runs in a folder",
    "experiments",
    run,
    ListCommand,
    position=8,
    memory_remedy=MORE_MEMORY,
)
