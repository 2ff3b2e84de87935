"""Small experiments with finished runs, to copy and to damage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from damage import Place
from executors import train_here
from record_folders import Opened, forget_checksums
from samples import SMALL_EXPERIMENT
from storylab.data.dataset import Dataset
from storylab.experiments.plan import plan_runs
from storylab.experiments.recording import write_record
from storylab.experiments.spec import load_experiment
from storylab.reporting import report as reporting


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the experiment's file, its data, and its finished runs of two seeds."""
    root = tmp_path_factory.mktemp("record")
    shutil.copytree(dataset.folder, root / "data")
    (root / "rates.toml").write_text(SMALL_EXPERIMENT.format(seeds="1, 2"))
    for run in plan_runs(load_experiment(root / "rates.toml"), dataset, root / "runs"):
        assert train_here(run.config).status == "done"
    return root


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(trained, tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened()


@pytest.fixture(scope="module")
def whole(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The place before any damage, trained in this process; without checksums, so that damage meets the
    checks behind them."""
    place = Place(tmp_path_factory.mktemp("whole") / "place")
    shutil.copytree(dataset.folder, place.data)
    place.file.write_text(SMALL_EXPERIMENT.format(seeds="1, 2"))
    experiment = load_experiment(place.file)
    planned = plan_runs(experiment, dataset, place.runs)
    for run in planned:
        assert train_here(run.config).status == "done"
    shutil.copy(write_record(experiment, dataset, planned, place.runs), place.root)
    forget_checksums(place.root)
    return place


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """No figures: they are tested elsewhere, take seconds, and no flag leaves them out."""
    patch = pytest.MonkeyPatch()
    patch.setattr(reporting, "_figures", lambda outcome: ())
    yield
    patch.undo()
