"""The runs of an experiment in trackers: their place, and an executor that has them tracked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from storylab.errors import UserError
from storylab.execution.job import Executor, Job, OnEvent, Outcome
from storylab.experiments.factors import qualified_name
from storylab.experiments.records import experiment_records, read_experiment
from storylab.tracking.protocol import Place


def place_of(folder: Path) -> Place:
    """The place of a run in trackers: the experiment that planned it, its arm and its seed.

    Several experiments may share a run. The one that was registered first counts, so that the place is the
    same whenever and for whichever experiment the run is sent. A damaged record counts as none.
    """
    found = sorted(_places(folder.absolute()), key=lambda item: item[0])
    return found[0][1] if found else Place(folder.absolute().name)


def _places(folder: Path) -> Iterator[tuple[tuple[str, str], Place]]:
    """The time of registration and the place, for every experiment that lists the run."""
    for path in experiment_records(folder.parent):
        try:
            record = read_experiment(path)
        except UserError:
            continue
        time = record.registered.time if record.registered else ""
        for cell in record.cells:
            group = qualified_name(cell.arm, cell.condition)
            for seed, name in cell.runs.items():
                if name == folder.name:
                    yield (time, path.stem), Place(f"{group}, seed {seed}", path.stem, group)


class TrackingExecutor:
    """Has another executor carry out the jobs, and the runs among them sent to trackers.

    Args:
        executor: carries the jobs out.
        names: trackers.
    """

    def __init__(self, executor: Executor, names: Sequence[str]) -> None:
        self._executor, self._names = executor, list(names)
        self.slots = executor.slots

    def run(self, job: Job, on_event: OnEvent) -> Outcome:
        """See :class:`storylab.execution.job.Executor`."""
        if job.action == "train" and job.config.out_dir is not None:
            place = msgspec.to_builtins(place_of(job.config.out_dir))
            options = {**job.options, "track": self._names, "place": place}
            job = dataclasses.replace(job, options=options)
        return self._executor.run(job, on_event)

    def stop(self) -> None:
        """See :class:`storylab.execution.job.Executor`."""
        self._executor.stop()
