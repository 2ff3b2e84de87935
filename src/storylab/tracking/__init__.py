"""Trackers: programs that show runs, such as TensorBoard; a tracker is one module in ``trackers/`` and one
entry in :data:`TRACKERS`.

No library is imported here: each tracker works in a process of its own, which alone imports it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from storylab.errors import UserError


@dataclass(frozen=True)
class TrackerEntry:
    """The facts about a tracker that are known without its library.

    Attributes:
        target: module and class, as ``module:Class``; see :class:`storylab.tracking.protocol.Tracker`.
        requires: modules that the class imports, none of them ours.
        extra: extra of storylab that installs them; empty where none is needed.
    """

    target: str
    requires: tuple[str, ...] = ()
    extra: str = ""


_HERE = "storylab.tracking.trackers"
TRACKERS: Mapping[str, TrackerEntry] = {
    "tensorboard": TrackerEntry(
        f"{_HERE}.tensorboard:TensorBoardTracker", ("tensorboard",), "tensorboard"
    ),
    "wandb": TrackerEntry(f"{_HERE}.wandb:WandbTracker", ("wandb",), "wandb"),
    "mlflow": TrackerEntry(f"{_HERE}.mlflow:MlflowTracker", ("mlflow",), "mlflow"),
    "trackio": TrackerEntry(f"{_HERE}.trackio:TrackioTracker", ("trackio",), "trackio"),
}


def require_installed(names: Collection[str]) -> None:
    """Make sure that the libraries of trackers are installed, without importing them.

    Raises:
        UserError: one is missing.
    """
    for name in names:
        entry = TRACKERS[name]
        missing = [module for module in entry.requires if importlib.util.find_spec(module) is None]
        if missing:
            raise UserError(
                f"{name} needs the package {', '.join(missing)}: pip install 'storylab[{entry.extra}]'"
            )
