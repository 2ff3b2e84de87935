"""Shared fixtures: a small prepared data set and a config that trains on it in a second."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from samples import MakeConfig, tiny
from storylab.config import TrainConfig
from storylab.data.dataset import Dataset
from storylab.data.prepare import PrepareConfig, prepare

# Where the sample of real stories is; tests that need it are skipped elsewhere.
REAL_DATA = Path(
    os.environ.get("STORYLAB_REAL_DATA", Path(__file__).parents[2] / "shared" / "data")
)

torch.set_num_threads(1)  # the models here are too small to share between threads


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip on Windows what Windows cannot do."""
    if sys.platform == "win32":
        for item in items:
            if item.get_closest_marker("posix"):
                item.add_marker(pytest.mark.skip(reason="Windows lacks what this needs"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """300 built-in stories with a vocabulary of 300 ids."""
    out = tmp_path_factory.mktemp("data") / "builtin"
    return prepare(
        PrepareConfig(source="builtin", tokenizer="bpe:300", out=out, builtin_stories=300)
    )


@pytest.fixture
def tiny_config(dataset: Dataset, tmp_path: Path) -> MakeConfig:
    """A config of a two-layer model that trains 8 iterations; keywords change single values."""

    def make(**changes: Any) -> TrainConfig:
        return tiny(dataset, tmp_path / "run", **changes)

    return make


@pytest.fixture(scope="session")
def real_stories() -> Path:
    """Folder with real TinyStories parquet files, where this machine has them."""
    folder = REAL_DATA / "tinystories"
    if not folder.is_dir():
        pytest.skip(f"no real TinyStories in {folder}: set STORYLAB_REAL_DATA to their folder")
    return folder


@pytest.fixture
def browser() -> Iterator[Any]:
    """Debian's chromium, without a window."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if binary is None:
        pytest.skip("there is no chromium on this machine")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield chromium
        chromium.close()
