"""Fixtures of the tests of experiments."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from record_folders import forget_checksums


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of its own for every test, so that its draws depend on no other test."""
    return np.random.default_rng(11)


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy, to change, of the runs that the module's fixture ``trained`` has trained."""
    shutil.copytree(trained, tmp_path / "runs")
    forget_checksums(tmp_path)
    return tmp_path / "runs"
