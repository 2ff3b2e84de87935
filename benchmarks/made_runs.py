"""Registered experiments whose runs are copies of one real run, for benchmarks of many runs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from storylab.checksums import read_checksums, sha256_file, write_checksums
from storylab.config import TrainConfig, to_dict
from storylab.data.dataset import Dataset
from storylab.data.prepare import PrepareConfig, prepare
from storylab.execution.training import train_or_resume
from storylab.experiments.experiment import Experiment
from storylab.experiments.plan import PlannedRun, plan_runs
from storylab.experiments.queue import enqueue
from storylab.experiments.records import FolderCache
from storylab.experiments.spec import load_experiment
from storylab.record.folder import CONFIG, METRICS, SUMMARY

ARMS = 10
EXPERIMENT = """
title = "Many runs"
purpose = "How long does it take to keep account of them?"
factor = "learning_rate"
seeds = [1, 2]
looks = [{looks}]
[config]
preset = "nano"
n_layer = 1
n_head = 1
n_kv_head = 1
n_embd = 16
n_hidden = 16
dtype = "float32"
max_iters = 3
batch_size = 4
gradient_accumulation_steps = 1
block_size = 16
warmup_iters = 2
eval_interval = 3
eval_iters = 1
device = "cpu"
[arms]
"""


class Silent:
    """Shows nothing of an experiment's progress."""

    def line(self, text: str) -> None:
        """Drop a line."""

    def progress(self, name: str, done: int, total: int) -> None:
        """Drop progress."""

    def overall(self, name: str, done: float, total: float) -> None:
        """Drop progress."""


def plan(place: Path, count: int, looks: Sequence[int] = ()) -> tuple[Experiment, Dataset]:
    """An experiment of ``ARMS`` arms and ``count`` runs up to its last look, and a small data set.

    Args:
        place: a folder for the file and the data.
        count: number of runs, a multiple of ``ARMS``.
        looks: numbers of seeds at which it is judged; by default one look at the end.
    """
    place.mkdir(parents=True, exist_ok=True)
    arms = "".join(
        f'"arm{i}" = {{ learning_rate = {1e-3 * (1 + i / 100)} }}\n' for i in range(ARMS)
    )
    text = EXPERIMENT.format(looks=", ".join(map(str, looks or [count // ARMS]))) + arms
    (place / "many.toml").write_text(text, encoding="utf-8")
    data = PrepareConfig("builtin", tokenizer="bpe:300", out=place / "data", builtin_stories=300)
    return load_experiment(place / "many.toml"), prepare(data)


def register(place: Path, count: int, looks: Sequence[int] = ()) -> list[PlannedRun]:
    """Register an experiment for workers in ``place / "runs"``; returns its planned runs."""
    experiment, dataset = plan(place, count, looks)
    runs, seeds = place / "runs", experiment.first_seeds(count // ARMS)
    planned = plan_runs(experiment, dataset, runs, seeds, cache=FolderCache())
    enqueue(experiment, dataset, planned, runs)
    return planned


def train_template(config: TrainConfig, folder: Path, rows: int = 4) -> None:
    """Train a run in ``folder``, and stretch its record to a number of iterations."""
    train_or_resume(dataclasses.replace(config, out_dir=folder), lambda event: None)
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[0])
    more = (json.dumps(row | {"iteration": i, "tokens": 64 * (i + 1)}) for i in range(rows))
    (folder / METRICS).write_text("\n".join(more) + "\n", encoding="utf-8")
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    summary |= {"iterations": rows, "tokens": 64 * rows}
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2), encoding="utf-8")
    names = [name for name in read_checksums(folder).sums if "/" not in name]
    write_checksums(folder, {name: sha256_file(folder / name) for name in names})


def finish(config: TrainConfig, template: Path) -> None:
    """Make the finished run of a config from a template: links to its files, and a config of its own.

    The summary comes last, as in a real run.
    """
    folder = config.out_dir
    assert folder is not None
    folder.mkdir(exist_ok=True)
    sums = dict(read_checksums(template).sums)
    (folder / CONFIG).write_text(json.dumps(to_dict(config), indent=2), encoding="utf-8")
    sums[CONFIG] = sha256_file(folder / CONFIG)
    write_checksums(folder, sums)
    for name in sorted(sums.keys() - {CONFIG}, key=lambda name: name == SUMMARY):
        if not (folder / name).exists():
            os.link(template / name, folder / name)
