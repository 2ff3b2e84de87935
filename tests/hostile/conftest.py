"""Whole files to change: a small data set, a finished run, and the record of an experiment."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fuzz_targets import Example, make_example


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """The files as they were written."""
    return make_example(tmp_path_factory.mktemp("hostile") / "whole")


@pytest.fixture
def example(whole: Example, tmp_path: Path) -> Example:
    """A copy to change."""
    root = tmp_path / "copy"
    shutil.copytree(whole.data.parent, root)
    places = {
        name: root / path.relative_to(whole.data.parent) for name, path in vars(whole).items()
    }
    return Example(**places)
