"""Train one run on the terminal; shared by several verbs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from storylab.cli.console import ConsoleReporter

if TYPE_CHECKING:
    from storylab.record.folder import RunFolder


def show_training(train: Callable[..., RunFolder], track: Sequence[str] = ()) -> int:
    """Train under a console reporter and trackers, and print the run folder; returns the exit code.

    Args:
        train: trains; takes observers.
        track: names of trackers.

    Raises:
        UserError: a tracker's library is not installed.
        UserError, Interrupted, Diverged: from ``train``.
    """
    from storylab.experiments.tracked import place_of
    from storylab.tracking.observer import trackers

    with trackers(track, place_of) as observers, ConsoleReporter() as reporter:
        run = train(reporter, *observers)
        reporter.line("")
        reporter.line(f"Run folder: {run.folder}")
        for observer in observers:
            if observer.place:
                reporter.line(f"{observer.label}: {observer.place}")
    return 0
