"""No file of a finished experiment is read twice by one command, the experiments' records included."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from executors import InProcess, Unused
from record_folders import Opened, folders
from samples import SMALL_EXPERIMENT
from storylab.cli import main
from storylab.experiments.leases import LEASES
from storylab.reporting import report as reporting

# An experiment that trains faster, and shares no run with the first.
QUICK = SMALL_EXPERIMENT.replace('dtype = "fp8"', 'dtype = "float32"')
QUICK = QUICK.replace('backend = "emulated"\n', "").replace("quantization_stats = true\n", "")


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds and reads no file; no flag leaves figures out."""
    monkeypatch.setattr(reporting, "_figures", lambda outcome: ())


def two_experiments(place: Path, seeds: str) -> None:
    """Finish two experiments that share no run: the report shows the log of a run of each."""
    for name, text in (("rates", SMALL_EXPERIMENT), ("other", QUICK)):
        text = text.format(seeds=seeds).replace("[config]", "looks = [2]\n[config]")
        (place / f"{name}.toml").write_text(text)
    assert main(command(place, "run", "rates"), Unused()) == 0
    assert main(command(place, "run", "other"), InProcess()) == 0


def command(place: Path, verb: str, name: str, *flags: str) -> list[str]:
    file, runs, data = (str(place / part) for part in (f"{name}.toml", "runs", "data"))
    return ["experiment", verb, file, "--runs", runs, "--data_dir", data, *flags]


def require_one_reading(count: Counter[str], place: Path, *records: str) -> None:
    """Every file was read once; of shards, which are hashed and then mapped, twice.

    Leases do not count: another process may have claimed one since they were read.
    """
    leases = str(place / "runs" / LEASES) + os.sep
    for path, times in count.items():
        if path.startswith(leases):
            continue
        assert times <= (2 if path.endswith(".bin") else 1), path
    for record in records:
        assert count[str(place / "runs/experiments" / record)] == 1
    run = folders(place)[0]
    for name in ("config.json", "summary.json", "metrics.jsonl", "story_losses.npy"):
        assert count[str(run / name)] == 1


@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["1, 2", "1"])
def test_a_finished_experiment_reads_no_file_twice(place: Path, opened: Opened, seeds: str) -> None:
    """With one seed, the noise of the other one in the folder is read too."""
    two_experiments(place, seeds)
    with opened.under(place) as count:
        assert main(command(place, "run", "rates"), Unused()) == 0
    require_one_reading(count, place, "rates.json", "other.json")


@pytest.mark.slow
def test_the_report_reads_no_file_twice(place: Path, opened: Opened) -> None:
    two_experiments(place, "1, 2")
    with opened.under(place) as count:
        assert main(["experiment", "report", "--runs", str(place / "runs")], Unused()) == 0
    require_one_reading(count, place, "rates.json", "other.json")


@pytest.mark.slow
def test_a_finished_confirmation_reads_no_file_twice(place: Path, opened: Opened) -> None:
    assert main(command(place, "run", "rates"), Unused()) == 0
    (place / "other.toml").write_text(QUICK.format(seeds="1, 2"))
    assert main(command(place, "confirm", "other"), InProcess()) == 0
    with opened.under(place) as count:
        assert main(command(place, "confirm", "other"), Unused()) == 0
    records = ("rates.json", "other-confirm.json", "test-openings.jsonl")
    require_one_reading(count, place, *records)
