"""``storylab ui``."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from storylab.cli.arguments import DEFAULT_RUNS_DIR, require_runs_folder
from storylab.cli.registry import MORE_MEMORY, Call, Verb
from storylab.errors import UserError


@dataclass(frozen=True)
class UiCommand:
    """Serve a page over a folder of runs: list, live curves, samples, configs, experiments.

    The page is for this machine alone and changes nothing. Ctrl-C ends it.

    Examples: storylab ui | storylab ui --runs runs --port 9000 --open
    """

    runs: Path = DEFAULT_RUNS_DIR
    """Folder that holds the run folders."""
    port: int = 8484
    """Port on 127.0.0.1; 0 for any free one."""
    open: bool = False
    """Show the page in the browser."""


def run(call: Call) -> int:
    """Serve the page until Ctrl-C."""
    command = call.parse(UiCommand)
    require_runs_folder(command.runs)
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise UserError("the page needs two more packages: pip install 'storylab[ui]'")
    from storylab.cli.tables import print_lines
    from storylab.ui.server import ADDRESS, open_port, serve

    with open_port(command.port) as listener:
        address = f"http://{ADDRESS}:{listener.getsockname()[1]}/"
        print_lines(f"{command.runs} is shown at {address} (Ctrl-C ends it)")
        if command.open:
            webbrowser.open(address)
        serve(command.runs, listener)
    return 0


VERB = Verb(
    "ui",
    "serve a local page over a folder of runs",
    "experiments",
    run,
    UiCommand,
    position=10,
    memory_remedy=MORE_MEMORY,
)
