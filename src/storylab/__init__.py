"""storylab: language-model training experiments that one person can run, trust and compare.

The functions below are the public API. They print nothing; modules are imported when first used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from storylab.config import TrainConfig, preset_config
from storylab.errors import UserError

if TYPE_CHECKING:
    from storylab.data.dataset import Dataset
    from storylab.data.prepare import PrepareConfig
    from storylab.record.run import Run
    from storylab.training.loop import Reporter
    from storylab.training.sampling import StoryModel

__version__ = "0.1.0"
__all__ = [
    "TrainConfig",
    "UserError",
    "__version__",
    "load_model",
    "load_run",
    "prepare",
    "preset_config",
    "train",
]


def prepare(config: PrepareConfig) -> Dataset:
    """Make the data set that a ``storylab.data.prepare.PrepareConfig`` describes, or find it made.

    Raises:
        UserError: a source cannot be had, or the folder holds something else.
    """
    from storylab.data.prepare import prepare as make

    return make(config)


def train(config: TrainConfig, reporter: Reporter | None = None) -> Run:
    """Train a model in a new run folder; ``reporter`` gets its lines and progress.

    Raises:
        UserError: data, device or folder cannot be used.
    """
    from storylab.training.loop import train as run_training

    return load_run(run_training(config, reporter).folder)


def load_run(folder: str | Path) -> Run:
    """Read the run in ``folder``: its config, data, environment, metrics and summary.

    Raises:
        UserError: there is no run, or a file of it is damaged.
    """
    from storylab.record.run import load_run as load

    return load(Path(folder))


def load_model(folder: str | Path, checkpoint: str = "last", device: str = "auto") -> StoryModel:
    """The model of a run, ``last`` or ``best``, ready to ``sample("Once upon a time")``.

    Raises:
        UserError: there is no run, or its checkpoint is missing or altered.
    """
    from storylab.record.folder import open_run
    from storylab.training.sampling import load_story_model

    return load_story_model(open_run(Path(folder)), checkpoint, device)
