"""Train one run on the terminal; shared by several verbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from storylab.cli.console import ConsoleReporter
from storylab.errors import Diverged, Interrupted

if TYPE_CHECKING:
    from storylab.record.folder import RunFolder


def show_training(train: Callable[[ConsoleReporter], RunFolder], prints: bool = True) -> int:
    """Train under a console reporter and print the run folder; returns the exit code.

    Args:
        train: trains, in a process of the run.
        prints: False in a process that does not lead its run. It leaves the end that all of them come to
            for the leading one to tell.

    Raises:
        UserError, Interrupted, Diverged: from ``train``.
    """
    with ConsoleReporter() as reporter:
        try:
            run = train(reporter)
        except (Interrupted, Diverged) as error:
            if prints:
                raise
            return error.exit_code
        if prints:
            reporter.line("")
            reporter.line(f"Run folder: {run.folder}")
    return 0
