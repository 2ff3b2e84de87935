"""Train one run on the terminal; shared by several verbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from storylab.cli.console import ConsoleReporter

if TYPE_CHECKING:
    from storylab.record.folder import RunFolder


def show_training(train: Callable[[ConsoleReporter], RunFolder]) -> int:
    """Train under a console reporter and print the run folder; returns the exit code.

    Raises:
        UserError, Interrupted, Diverged: from ``train``.
    """
    with ConsoleReporter() as reporter:
        run = train(reporter)
        reporter.line("")
        reporter.line(f"Run folder: {run.folder}")
    return 0
