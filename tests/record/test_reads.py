"""No file of a finished experiment is read twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from executors import Unused
from record_folders import Opened, folders
from samples import SMALL_EXPERIMENT
from storylab.cli import main
from storylab.reporting import report as reporting


@pytest.mark.parametrize("seeds", ["1, 2", "1"])
def test_a_finished_experiment_reads_no_file_twice(
    place: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch, seeds: str
) -> None:
    """With one seed, the noise of the other one in the folder is read too."""
    file = place / "rates.toml"
    file.write_text(SMALL_EXPERIMENT.format(seeds=seeds))
    # Drawing takes seconds and reads no file; no flag leaves figures out.
    monkeypatch.setattr(reporting, "_figures", lambda outcome: ())
    args = ["--runs", str(place / "runs"), "--data_dir", str(place / "data")]
    assert main(["experiment", "run", str(file), *args], Unused()) == 0
    with opened.under(place) as count:
        assert main(["experiment", "run", str(file), *args], Unused()) == 0
    run = folders(place)[0]
    for name in ("config.json", "summary.json", "metrics.jsonl", "story_losses.npy"):
        assert count[str(run / name)] == 1
    # Shards are hashed and then mapped. The experiment's record, a small file that other processes may
    # change, is read under its lock before every change and again by each part that reports on it.
    expected = {".bin": 2, "experiments": 7}
    for path, times in count.items():
        kind = Path(path).suffix if Path(path).suffix == ".bin" else Path(path).parent.name
        assert times <= expected.get(kind, 1), path
