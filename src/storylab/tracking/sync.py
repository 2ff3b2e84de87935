"""Send runs that have ended to a tracker."""

from __future__ import annotations

from pathlib import Path

from storylab.errors import UserError
from storylab.record.folder import open_run
from storylab.tracking import TRACKERS
from storylab.tracking.link import TrackerLink
from storylab.tracking.protocol import Place
from storylab.tracking.run import tracked_run


def sync(folder: Path, name: str, place: Place, seconds: float) -> str:
    """Send a whole run to a tracker, by the same id as while it trained; returns where it can be seen.

    Args:
        folder: a run that has ended.
        name: the tracker, which is installed.
        place: project, group and name of the run.
        seconds: to wait for the tracker at most.

    Raises:
        UserError: the run has not ended or is damaged, or the tracker failed or took longer.
    """
    run = open_run(folder)
    summary = run.read_summary()
    if summary is None:
        raise UserError(
            f"{folder} has not ended: continue it with storylab resume {folder} --track {name}"
        )
    run.read_rows()  # so that a damaged row is named here
    link = TrackerLink(TRACKERS[name].target, tracked_run(folder, place))
    try:
        link.finish(summary, seconds)
    finally:
        link.kill()
    if link.answer is None or link.late:
        raise UserError(
            f"{name} did not take {folder} in {seconds:g} s: try again, or give more --seconds"
        )
    if link.answer.failed:
        raise UserError(f"{name} failed with {folder}: {link.answer.failed}")
    return link.answer.place
