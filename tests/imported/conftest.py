"""One small run, and the model that an export of it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from exported import train_small
from storylab.data.dataset import Dataset
from storylab.export.folder import export_run
from storylab.imported.folder import import_model
from storylab.record.run import Run


@pytest.fixture(scope="session")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_small(dataset, tmp_path_factory.mktemp("imported") / "small")


@pytest.fixture(scope="session")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as a folder for `transformers`."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    with pytest.MonkeyPatch.context() as patch:  # the program itself is not needed here
        patch.setattr("storylab.export.folder.installed", lambda module: False)
        export_run(run.folder, "hf", None, "last", folder)
    return folder


@pytest.fixture(scope="session")
def imported(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    import_model(exported, folder)
    return folder
