"""A tracker as an observer of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from storylab.record.schema import Row, Summary
from storylab.tracking import TRACKERS, TrackerEntry, require_installed
from storylab.tracking.link import CAPACITY, TrackerLink
from storylab.tracking.protocol import Place
from storylab.tracking.run import tracked_run
from storylab.training.observers import Observer

# Seconds that the end of a run waits for a tracker to send the rest.
END_SECONDS = 60.0
# The same for a run that was stopped: whoever stops it may have little time.
STOP_SECONDS = 5.0


class TrackerFailed(Exception):  # noqa: N818 - the run goes on
    """A tracker does not get everything; the message says why and how to send it later."""


def plain_place(folder: Path) -> Place:
    """The place of a run of no experiment."""
    return Place(folder.absolute().name)


class TrackerObserver(Observer):
    """Sends rows, evaluations and results of a run to a tracker.

    A tracker that fails, hangs or is killed cannot stop or change the run: its library works in another
    process, rows wait in a bounded queue, and the end waits ``end_seconds`` at most.

    Args:
        name: a key of :data:`storylab.tracking.TRACKERS`.
        find_place: the project, group and name of the run in a folder.
        entry: by default that of ``name``.
        capacity: rows that may wait for a slow tracker; further ones are dropped and counted.
        end_seconds: seconds to wait at the end of the run.
        stop_seconds: seconds to wait where the run is stopped.

    Raises:
        UserError: the tracker's library is not installed.
    """

    def __init__(
        self,
        name: str,
        find_place: Callable[[Path], Place] = plain_place,
        *,
        entry: TrackerEntry | None = None,
        capacity: int = CAPACITY,
        end_seconds: float = END_SECONDS,
        stop_seconds: float = STOP_SECONDS,
    ) -> None:
        if entry is None:
            require_installed([name])
        self.label = f"tracker {name}"
        self.place = ""
        """Where the run can be seen, once it has ended."""
        self._name, self._find_place = name, find_place
        self._entry = entry or TRACKERS[name]
        self._capacity = capacity
        self._end_seconds, self._stop_seconds = end_seconds, stop_seconds
        self._folder = Path()
        self._link: TrackerLink | None = None

    def start(self, folder: Path) -> None:
        """Start the tracker's process, which reads the rows that are there itself."""
        self._folder = folder
        run = tracked_run(folder, self._find_place(folder))
        self._link = TrackerLink(self._entry.target, run, self._capacity)

    def row(self, row: Row) -> None:
        """Queue a row.

        Raises:
            TrackerFailed: the tracker's process has ended.
        """
        if self._link is None:
            return
        if self._link.answer is not None:
            raise self._failure(self._link.answer.failed or "it ended early")
        self._link.put(row)

    def end(self, summary: Summary | None) -> None:
        """Have the rest sent.

        Raises:
            TrackerFailed: rows were dropped, or the tracker failed or did not end in time.
        """
        link, self._link = self._link, None
        if link is None:
            return
        seconds = self._stop_seconds if summary is None else self._end_seconds
        link.finish(summary, seconds)
        answer = link.answer
        if answer is None or link.late:
            missing = link.dropped + link.waiting
            lacks = f"lacks {missing:,} rows or more" if missing else "may lack rows"
            raise self._failure(f"it was not done {seconds:g} s after the end and {lacks}")
        if answer.failed:
            raise self._failure(answer.failed)
        self.place = answer.place
        if link.dropped:
            rows = link.dropped + link.handed_over
            raise self._failure(
                f"it was slower than the run, and {link.dropped:,} of {rows:,} rows were not sent"
            )

    def close(self) -> None:
        """End the tracker's process of a run that ended with an error."""
        link, self._link = self._link, None
        if link is not None:
            link.finish(None, self._stop_seconds)

    def _failure(self, reason: str) -> TrackerFailed:
        return TrackerFailed(
            f"{reason}. Send the whole run later: storylab sync {self._folder} --to {self._name}"
        )


@contextmanager
def trackers(
    names: Sequence[str], find_place: Callable[[Path], Place] = plain_place
) -> Iterator[list[TrackerObserver]]:
    """Observers for the trackers ``names``, whose processes end with the block at the latest.

    Raises:
        UserError: a tracker's library is not installed.
    """
    observers = [TrackerObserver(name, find_place) for name in dict.fromkeys(names)]
    try:
        yield observers
    finally:
        for observer in observers:
            observer.close()
