"""A folder with experiment files and their runs, planned directly or by the command line, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from executors import InProcess
from reporters import Quiet
from samples import TWO_RATES
from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.experiments.experiment import Experiment
from storylab.experiments.plan import plan_runs
from storylab.experiments.recording import write_record
from storylab.experiments.records import read_experiment
from storylab.experiments.scheduler import run_experiment
from storylab.experiments.spec import load_experiment
from storylab.record.experiment_schema import ExperimentRecord


class ExperimentFolder:
    """Experiment files, and a folder for their runs."""

    def __init__(self, root: Path, dataset: Dataset) -> None:
        self.root, self.dataset, self.runs = root, dataset, root / "runs"

    def write(self, text: str = TWO_RATES, name: str = "rates") -> Path:
        path = self.root / f"{name}.toml"
        path.write_text(text)
        return path

    def record_path(self, name: str = "rates") -> Path:
        return self.runs / "experiments" / f"{name}.json"

    def read_record(self, name: str = "rates") -> ExperimentRecord:
        return read_experiment(self.record_path(name))


class Lab(ExperimentFolder):
    """Plans and trains by the functions that the verbs use."""

    def load(self, text: str = TWO_RATES, name: str = "rates") -> Experiment:
        return load_experiment(self.write(text, name))

    def record(
        self, text: str = TWO_RATES, name: str = "rates", train: bool = False, **options: Any
    ) -> ExperimentRecord:
        """Write the record as `experiment run` does, and train if asked to; returns the record."""
        experiment, fresh = self.load(text, name), options.pop("fresh", False)
        planned = plan_runs(experiment, self.dataset, self.runs, **options)
        path = write_record(experiment, self.dataset, planned, self.runs, fresh)
        record = read_experiment(path)
        if train:
            run_experiment(planned, InProcess(), Quiet())
        return record


class Bench(ExperimentFolder):
    """Runs verbs of `storylab experiment` in this process."""

    def __init__(self, root: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(root, dataset)
        self.capsys = capsys

    def call(
        self, verb: str, *flags: str, name: str = "rates", executor: InProcess | None = None
    ) -> tuple[int, str, str]:
        """Returns the exit code, standard output and standard error."""
        args = ["--runs", str(self.runs), "--data_dir", str(self.dataset.folder)]
        file = str(self.root / f"{name}.toml")
        code = main(["experiment", verb, file, *args, *flags], executor=executor or InProcess())
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err
