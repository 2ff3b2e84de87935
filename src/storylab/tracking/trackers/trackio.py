"""Trackio: a database of this machine, a server, or a Space of Hugging Face.

Written against trackio 0.43. On this machine a run is written whole every time. On a server or Space
Trackio offers no way to replace points, so a run that is sent there again has them twice. Only the local
mode is tested.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import trackio

from storylab.tracking.points import Point, RunEnd, quoted
from storylab.tracking.protocol import DEFAULT_PROJECT, TrackedRun

REMOTE_VARIABLES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioTracker:
    """Sends a run under its name and the first digits of its id, by which Trackio knows it."""

    def __init__(self, run: TrackedRun) -> None:
        project = run.place.project or DEFAULT_PROJECT
        remote = any(os.environ.get(name) for name in REMOTE_VARIABLES)
        if not remote:
            _delete(project, run.label)
        self._run = trackio.init(
            project=project,
            name=run.label,
            group=run.place.group or None,
            config=run.config,
            resume="allow" if remote else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.place = f'trackio show --project "{project}"'

    def log(self, points: Sequence[Point]) -> None:
        """See :class:`storylab.tracking.protocol.Tracker`."""
        for point in points:
            self._run.log(dict(point.values), step=point.step)

    def finish(self, end: RunEnd | None) -> None:
        """See :class:`storylab.tracking.protocol.Tracker`."""
        if end is not None:
            samples = {
                f"samples/{number}": trackio.Markdown(quoted(sample.text))
                for number, sample in enumerate(end.samples, start=1)
            }
            self._run.log({**end.values, **end.notes, **samples}, step=end.step)
        self._run.finish()


def _delete(project: str, name: str) -> None:
    """Delete an earlier version of a run, if there is one."""
    try:
        runs = list(trackio.Api().runs(project))
    except ValueError:  # there is no such project
        return
    for run in runs:
        if run.name == name:
            run.delete()
