"""One small run to export."""

from __future__ import annotations

from pathlib import Path

import pytest

import storylab
from samples import TINY
from storylab.config import TrainConfig
from storylab.data.dataset import Dataset
from storylab.record.run import Run


@pytest.fixture(scope="session")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of 30 iterations, which is enough for tokens that are clearly the most likely."""
    folder: Path = tmp_path_factory.mktemp("export") / "small"
    return storylab.train(
        TrainConfig(
            model=TINY,
            data_dir=dataset.folder,
            out_dir=folder,
            dtype="float32",
            max_iters=30,
            batch_size=8,
            gradient_accumulation_steps=1,
            block_size=48,
            learning_rate=1e-2,
            warmup_iters=2,
            eval_interval=30,
            eval_iters=1,
            device="cpu",
        )
    )
