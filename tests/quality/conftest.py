"""One small run whose quality is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

import storylab
from samples import tiny
from storylab.data.dataset import Dataset
from storylab.record.run import Run


@pytest.fixture(scope="session")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of 60 iterations, whose stories are far from random."""
    folder: Path = tmp_path_factory.mktemp("quality") / "small"
    return storylab.train(
        tiny(
            dataset,
            folder,
            max_iters=60,
            batch_size=8,
            gradient_accumulation_steps=1,
            block_size=48,
            eval_interval=60,
        )
    )
