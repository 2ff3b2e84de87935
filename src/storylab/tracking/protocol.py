"""The facts that a tracker gets, and the protocol of a tracker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from msgspec import Struct

from storylab.record.schema import Row, Summary
from storylab.tracking.points import Point, RunEnd

DEFAULT_PROJECT = "storylab"


class Place(Struct, frozen=True):
    """Where a tracker shows a run.

    ``project`` is the name of the run's experiment, ``group`` its arm with the condition. Both are empty
    for a run of no experiment. ``name`` is the name for people.
    """

    name: str
    project: str = ""
    group: str = ""


class TrackedRun(Struct, frozen=True, kw_only=True):
    """A run as a tracker sees it at the start."""

    id: str
    """32 hexadecimal digits that belong to this run alone, however often and wherever it is sent from."""
    place: Place
    folder: str
    """Absolute path of the run folder."""
    started: float
    """Start of the run, in seconds since 1970."""
    config: dict[str, Any]
    """Config and origin of the run by name: strings, numbers, booleans and None."""
    history: str
    """Path of the ``metrics.jsonl`` whose first ``history_bytes`` bytes are the rows so far."""
    history_bytes: int

    @property
    def label(self) -> str:
        """The name, with digits of the id that set it apart from a run of the same name."""
        return f"{self.place.name}-{self.id[:8]}"


class Rows(Struct, frozen=True, tag_field="message", tag="rows"):
    """Message to the process of a tracker: rows of the record, in order."""

    rows: list[Row]


class End(Struct, frozen=True, tag_field="message", tag="end"):
    """Message to the process of a tracker: the run has ended with a summary, or was stopped (None)."""

    summary: Summary | None


class Answer(Struct, frozen=True, kw_only=True):
    """The last words of a tracker's process."""

    place: str = ""
    """Where the run can be seen: a folder, an address or a command."""
    failed: str = ""
    """Why the tracker failed; empty if it did not."""


class Tracker(Protocol):
    """Sends one run to a tracker's library. Its constructor takes a :class:`TrackedRun`.

    It gets every point of the run, from the first iteration on, also where it was sent some of them before:
    it must replace those, or leave them out, so that no point is there twice.
    """

    place: str
    """See :class:`Answer`."""

    def log(self, points: Sequence[Point]) -> None:
        """Send points, in the order of their steps."""
        ...

    def finish(self, end: RunEnd | None) -> None:
        """Send the results, and wait until all is sent. None: the run was stopped and may go on."""
        ...
