"""One small run to export."""

from __future__ import annotations

import pytest

from exported import train_small
from storylab.data.dataset import Dataset
from storylab.record.run import Run


@pytest.fixture(scope="session")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_small(dataset, tmp_path_factory.mktemp("export") / "small")
