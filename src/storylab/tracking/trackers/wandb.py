"""Weights & Biases, online or offline.

Written against wandb 0.31. Online, steps that W&B has are left out. Offline, a run is written whole every
time, and its earlier folders are removed. Only the offline mode is tested.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import wandb

from storylab.tracking.points import Point, RunEnd
from storylab.tracking.protocol import DEFAULT_PROJECT, TrackedRun


class WandbTracker:
    """Sends a run under its id. The variables ``WANDB_...`` choose mode, folder and account."""

    def __init__(self, run: TrackedRun) -> None:
        # No output, code, machine or repository: the config says what the record has.
        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
        )
        self._run = wandb.init(
            project=run.place.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            group=run.place.group or None,
            name=run.place.name,
            id=run.id,
            config=run.config,
            resume="allow",
            settings=settings,
        )
        offline = self._run.offline
        # Steps before this one are at W&B from an earlier start.
        self._first = 0 if offline else self._run.step
        folder = Path(self._run.dir).parent
        self._earlier = set(folder.parent.glob(f"offline-run-*-{run.id}")) - {folder}
        self.place = f"wandb sync {folder}" if offline else str(self._run.url)
        self._offline = offline

    def log(self, points: Sequence[Point]) -> None:
        """See :class:`storylab.tracking.protocol.Tracker`."""
        for point in points:
            if point.step >= self._first:
                self._run.log(dict(point.values), step=point.step)

    def finish(self, end: RunEnd | None) -> None:
        """See :class:`storylab.tracking.protocol.Tracker`."""
        if end is not None:
            rows = [[sample.prompt, sample.text] for sample in end.samples]
            if end.step >= self._first:
                samples = wandb.Table(columns=["prompt", "text"], data=rows)
                self._run.log({"samples": samples}, step=end.step)
            self._run.summary.update(end.values | end.notes)
        self._run.finish(exit_code=0 if end is not None and end.status == "finished" else 1)
        wandb.teardown()
        for folder in self._earlier if self._offline else ():
            shutil.rmtree(folder, ignore_errors=True)
