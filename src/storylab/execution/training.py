"""The action that trains a run."""

from __future__ import annotations

import dataclasses

from storylab.config import TrainConfig
from storylab.execution.job import OnEvent, Progress
from storylab.files import exists
from storylab.record.folder import CONFIG, open_run
from storylab.training.observers import Observer
from storylab.training.resume import resume
from storylab.training.train import train


class _Events(Observer):
    """Passes progress on; log lines are in the run folder."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    def progress(self, name: str, done: int, total: int) -> None:
        self._on_event(Progress(name, done, total))


def train_or_resume(config: TrainConfig, on_event: OnEvent) -> None:
    """Train a run in ``config.out_dir``, or continue the run that is there.

    A run that is there goes on with its own config; only the data set's folder may have moved.

    Raises:
        UserError, Interrupted, Diverged: see :func:`storylab.training.train.train`.
    """
    assert config.out_dir is not None
    observer = _Events(on_event)
    if exists(config.out_dir / CONFIG):
        stored = open_run(config.out_dir).read_config()
        wanted = dataclasses.replace(stored, data_dir=config.data_dir)
        resume(config.out_dir, wanted, observer)
    else:
        train(config, observer)
