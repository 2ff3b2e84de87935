"""Observers watch a run (a terminal, a parent process, a tracker) and never change a bit of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from storylab.record.schema import Row, Summary


class Observer:
    """Watches a run. Override any of the methods; by default each does nothing.

    A run calls them in its own thread. An exception in one of them drops the observer and does not
    stop the run.
    """

    label = ""
    """Its name in the line that says that it was dropped; by default that of its class."""

    def start(self, folder: Path) -> None:
        """Training begins or goes on in a run folder."""

    def row(self, row: Row) -> None:
        """A row was added to ``metrics.jsonl``: an iteration, an evaluation or a quantized tensor."""

    def line(self, text: str) -> None:
        """A line was added to ``log.txt``, or is shown to observers only."""

    def progress(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` parts of the work called ``name`` are done."""

    def end(self, summary: Summary | None) -> None:
        """Training has stopped: with the summary, or None where a signal stopped it."""


class Observers(Observer):
    """Passes everything on to several observers and drops one that fails."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = list(observers)
        self.log: Callable[[str], None] = lambda line: None
        """Gets a line for every observer that was dropped."""

    def start(self, folder: Path) -> None:
        """See :class:`Observer`."""
        self._tell("start", folder)

    def row(self, row: Row) -> None:
        """See :class:`Observer`."""
        self._tell("row", row)

    def line(self, text: str) -> None:
        """See :class:`Observer`."""
        self._tell("line", text)

    def progress(self, name: str, done: int, total: int) -> None:
        """See :class:`Observer`."""
        self._tell("progress", name, done, total)

    def end(self, summary: Summary | None) -> None:
        """See :class:`Observer`."""
        self._tell("end", summary)

    def _tell(self, method: str, *values: Any) -> None:
        for observer in tuple(self._observers):
            if observer not in self._observers:
                continue  # this one was dropped during the loop
            try:
                getattr(observer, method)(*values)
            except Exception as error:
                self._observers.remove(observer)
                name, reason = (
                    observer.label or type(observer).__name__,
                    " ".join(str(error).split()),
                )
                line = f"{name} failed and no longer watches: {reason or type(error).__name__}"
                self.log(line)
                self.line(line)
