"""A run is read once, and its properties read nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import storylab
from record_folders import folders
from storylab.config import TrainConfig
from storylab.record.run import Run
from storylab.record.schema import EvaluationRow, IterationRow, QuantizationRow


def test_properties_of_a_run_read_nothing(place: Path) -> None:
    run = storylab.load_run(folders(place)[0])
    shutil.rmtree(place)
    assert run.config.max_iters == 4 and run.results.iterations == 5
    assert run.validation.loss == run.loss and len(run.position_losses) == 16
    assert [point.iteration for point in run.evaluations] == [2, 4]
    seconds = np.cumsum([row.step_seconds for row in run.iterations])
    assert run.evaluations[0].seconds == pytest.approx(seconds[1])
    assert {type(row) for row in run.rows} == {IterationRow, EvaluationRow, QuantizationRow}


def test_a_python_run_is_the_run_of_its_folder(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = storylab.train(tiny_config(out_dir=tmp_path / "run", max_iters=1))
    assert isinstance(run, Run) and run.finished
    assert storylab.load_run(tmp_path / "run").loss == run.loss
