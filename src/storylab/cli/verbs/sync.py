"""``storylab sync``."""

from __future__ import annotations

from dataclasses import dataclass

from storylab.cli.arguments import RunFolders, TrackerName
from storylab.cli.registry import MORE_MEMORY, Call, Verb
from storylab.errors import UserError
from storylab.tracking import require_installed


@dataclass(frozen=True)
class SyncCommand:
    """Send finished runs to a tracker. A run that it has is brought up to date and not doubled.

    Examples: storylab sync runs/a runs/b --to tensorboard | storylab sync runs/* --to wandb mlflow
    """

    runs: RunFolders
    """Run folders."""
    to: tuple[TrackerName, ...]
    """Trackers."""
    seconds: float = 600.0
    """Longest time for one run and one tracker."""


def run(call: Call) -> int:
    """Send every run to every tracker."""
    command = call.parse(SyncCommand)
    if not command.runs or not command.to:
        raise UserError("name one run and one tracker at least: storylab sync RUN --to tensorboard")
    require_installed(command.to)
    from storylab.cli.tables import print_lines
    from storylab.experiments.tracked import place_of
    from storylab.tracking.sync import sync

    for folder in command.runs:
        for name in command.to:
            sent = sync(folder, name, place_of(folder), command.seconds)
            print_lines(f"{folder}: {sent}")
    return 0


VERB = Verb(
    "sync",
    "send finished runs to a tracker",
    "runs",
    run,
    SyncCommand,
    operand="RUN...",
    position=9,
    memory_remedy=MORE_MEMORY,
)
