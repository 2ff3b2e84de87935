"""Stand-ins for trackers, which other processes must be able to import."""

from __future__ import annotations

import os
import sys

import pytest


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
