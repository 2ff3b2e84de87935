"""storylab: language-model training experiments that one person can run, trust and compare.

The functions below are the public API. They print nothing, and import their modules when first called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from storylab.errors import UserError

if TYPE_CHECKING:
    from storylab.config import TrainConfig, preset_config
    from storylab.data.dataset import Dataset
    from storylab.data.prepare_config import PrepareConfig
    from storylab.record.run import Run
    from storylab.training.observers import Observer
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


def __getattr__(name: str) -> Any:
    # The list of verbs need not wait for the config.
    if name in ("TrainConfig", "preset_config"):
        from storylab import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def prepare(config: PrepareConfig) -> Dataset:
    """Prepare the data set that ``config`` describes, or open it if it exists.

    Raises:
        UserError: a source cannot be read, or the folder holds something else.
    """
    from storylab.data.prepare import prepare as make

    return make(config)


def train(config: TrainConfig, *observers: Observer) -> Run:
    """Train a model in a new run folder; ``observers`` receive its rows, lines and progress.

    Raises:
        UserError: data, device or folder cannot be used.
        Interrupted: SIGTERM or Ctrl-C stopped the run; it can be resumed.
        Diverged: loss or gradients are not finite; the last good weights are kept.
    """
    from storylab.training.train import train as run_training

    return load_run(run_training(config, *observers).folder)


def load_run(folder: str | Path) -> Run:
    """Read the run in ``folder``: its config, data, environment, metrics and summary.

    Raises:
        UserError: ``folder`` holds no run, or a file of it is damaged.
    """
    from storylab.record.run import load_run as load

    return load(Path(folder))


def load_model(folder: str | Path, checkpoint: str = "last", device: str = "auto") -> StoryModel:
    """Load the model of a run, or an imported one, ready to ``sample("Once upon a time")``.

    Args:
        folder: a run folder, or the folder of an imported model.
        checkpoint: ``last`` (the newest weights) or ``best`` (lowest validation loss).
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: ``folder`` holds no model, or its weights are missing or altered.
    """
    from storylab.imported.folder import open_story_model

    return open_story_model(Path(folder), checkpoint, device)
