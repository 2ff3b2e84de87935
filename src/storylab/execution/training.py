"""The action that trains a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from storylab.config import TrainConfig
from storylab.execution.job import OnEvent, Progress
from storylab.files import exists
from storylab.leases import Fence, Lease
from storylab.record.folder import CONFIG, open_run
from storylab.tracking.observer import plain_place, trackers
from storylab.tracking.protocol import Place
from storylab.training.fenced import FencedProcess
from storylab.training.observers import Observer
from storylab.training.ranks import ONE_PROCESS
from storylab.training.resume import resume
from storylab.training.train import train


class _Events(Observer):
    """Passes progress on; log lines are in the run folder."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    def progress(self, name: str, done: int, total: int) -> None:
        self._on_event(Progress(name, done, total))


def train_or_resume(
    config: TrainConfig,
    on_event: OnEvent,
    track: Sequence[str] = (),
    place: Mapping[str, str] | None = None,
    lease: Mapping[str, Any] | None = None,
) -> None:
    """Train a run in ``config.out_dir``, or continue the run that is there.

    A run that is there goes on with its own config; only the data set's folder may have moved.

    Args:
        config: the run.
        on_event: receives the progress.
        track: names of trackers to send the run to.
        place: fields of its :class:`~storylab.tracking.protocol.Place` there; by default a run of no
            experiment.
        lease: fields of the :class:`~storylab.leases.Lease` under which it is trained, if any.

    Raises:
        UserError, Interrupted, Diverged: see :func:`storylab.training.train.train`.
        LeaseLost: another process has the run by now.
    """
    assert config.out_dir is not None
    ranks = ONE_PROCESS if lease is None else FencedProcess(Fence(Lease(**lease)))
    find_place = plain_place if place is None else lambda _: Place(**place)
    with trackers(track, find_place) as observers:
        if exists(config.out_dir / CONFIG):
            stored = open_run(config.out_dir).read_config()
            wanted = dataclasses.replace(stored, data_dir=config.data_dir)
            resume(config.out_dir, wanted, _Events(on_event), *observers, ranks=ranks)
        else:
            train(config, _Events(on_event), *observers, ranks=ranks)
