"""Rows and summaries are read as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from record_folders import folders, forget_checksums
from storylab.config import to_dict
from storylab.record.folder import RunFolder
from storylab.record.run import load_run
from storylab.record.schema import EvaluationRow, IterationRow
from storylab.record.stages import truncate_to


def test_what_is_written_is_read_back(place: Path) -> None:
    """Every file of a run, through its type, to the same JSON; American names are in the code alone."""
    forget_checksums(place)
    folder = folders(place)[0]
    run = RunFolder(folder)
    for name, value in (
        ("environment.json", run.read_environment()),
        ("data.json", run.read_data()),
        ("summary.json", run.read_summary()),
    ):
        assert msgspec.to_builtins(value) == json.loads((folder / name).read_text())
    assert to_dict(run.read_config()) == json.loads((folder / "config.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert msgspec.to_builtins(run.read_rows()) == rows
    assert "utilisation_percent" in rows[-1] and "utilisation_percent" in json.dumps(rows)
    run.append_rows([row for row in run.read_rows() if isinstance(row, IterationRow)][:1])
    assert len(run.read_rows()) == len(rows) + 1


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    row = EvaluationRow(iteration=1, train_loss=float("nan"), val_loss=1.0, best=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunFolder(tmp_path).append_rows([row])
    assert not list(tmp_path.iterdir())


def test_a_later_version_may_write_more(place: Path) -> None:
    folder = folders(place)[0]
    forget_checksums(place)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(json.dumps(json.loads(line) | {"later": {}}) for line in lines))
    for name in ("environment.json", "data.json", "summary.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"later": [1, None, "x"]}))
    assert load_run(folder).finished
    # What is not known is kept where a resumed run cuts its rows and notes its stage.
    run = RunFolder(folder)
    truncate_to(run, 3, run.read_config(), {"compile_fault": "none"})
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert all("later" in row and row["iteration"] < 3 for row in kept)
    assert sum(row["kind"] == "iteration" for row in kept) == 3
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["later"] == [1, None, "x"]
    (stage,) = run.read_environment().resumed
    assert (stage.iteration, stage.compile_fault) == (3, "none")
    assert run.read_summary() is None
    assert not any(
        (folder / f"{name}_losses.npy").exists() for name in ("story", "test", "position")
    )
