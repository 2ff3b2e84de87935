"""The progress of an experiment as it is shown, counted in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from storylab.experiments.plan import PlannedRun


class ExperimentReporter(Protocol):
    """Shows the progress of an experiment."""

    def line(self, text: str) -> None:
        """A line for the user."""
        ...

    def progress(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` parts of the work called ``name``, within one run, are done."""
        ...

    def overall(self, name: str, done: float, total: float) -> None:
        """``done`` of ``total`` tokens of the whole experiment are done; the run ``name`` is under way."""
        ...


class TokenCount:
    """Counts the tokens of an experiment that are trained, and shows them.

    Args:
        planned: all runs.
        reporter: shows the count.
    """

    def __init__(self, planned: Sequence[PlannedRun], reporter: ExperimentReporter) -> None:
        self._reporter = reporter
        self._total = float(sum(run.tokens for run in planned))
        self._done = 0.0
        self._under_way: dict[str, float] = {}

    def show(self, name: str, tokens: float = 0.0) -> None:
        """``tokens`` of the run ``name`` are trained so far."""
        self._under_way[name] = tokens
        done = self._done + sum(self._under_way.values())
        self._reporter.overall(name, done, self._total)

    def finish(self, name: str, tokens: float) -> None:
        """The run ``name``, of ``tokens``, needs no more work."""
        del self._under_way[name]
        self._done += tokens

    def show_end(self) -> None:
        """All runs are done."""
        self._reporter.overall("done", self._total, self._total)
