"""Train one run on the terminal; shared by several verbs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from storylab.cli.console import ConsoleReporter
from storylab.errors import Diverged, Interrupted

if TYPE_CHECKING:
    from storylab.record.folder import RunFolder


def show_training(
    train: Callable[..., RunFolder], track: Sequence[str] = (), prints: bool = True
) -> int:
    """Train under a console reporter and trackers, and print the run folder; returns the exit code.

    Args:
        train: trains, in a process of the run; takes observers.
        track: names of trackers.
        prints: False in a process that does not lead its run. It has no trackers, and leaves the end that
            all of them come to for the leading one to tell.

    Raises:
        UserError: a tracker's library is not installed.
        UserError, Interrupted, Diverged: from ``train``.
    """
    from storylab.experiments.tracked import place_of
    from storylab.tracking.observer import trackers

    with trackers(track if prints else (), place_of) as observers, ConsoleReporter() as reporter:
        try:
            run = train(reporter, *observers)
        except (Interrupted, Diverged) as error:
            if prints:
                raise
            return error.exit_code
        if prints:
            reporter.line("")
            reporter.line(f"Run folder: {run.folder}")
        for observer in observers:
            if observer.place:
                reporter.line(f"{observer.label}: {observer.place}")
    return 0
