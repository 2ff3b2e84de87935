"""Real libraries, offline: their data, read back, equals the record, however often a run is sent."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from executors import InProcess, perform_quietly
from samples import TINY
from storylab.cli import main
from storylab.config import TrainConfig
from storylab.data.dataset import Dataset
from storylab.errors import Interrupted
from storylab.execution.job import Job, Outcome
from storylab.experiments.plan import plan_runs
from storylab.experiments.spec import load_experiment
from storylab.experiments.tracked import place_of
from storylab.record.schema import IterationRow
from storylab.tracking.observer import TrackerObserver
from storylab.tracking.run import tracked_run
from storylab.training.observers import Observer
from storylab.training.resume import resume
from storylab.training.train import train

KEY = "0123456789abcdef0123456789abcdef01234567"
EXPERIMENT = """
title = "Two rates"
purpose = "A small experiment."
factor = "learning_rate"
baseline = "low"
seeds = [1]
[config]
preset = "nano"
n_layer = 1
n_head = 1
n_kv_head = 1
n_embd = 16
n_hidden = 16
max_iters = 4
batch_size = 4
gradient_accumulation_steps = 1
block_size = 16
min_lr = 0.0
warmup_iters = 2
eval_interval = 2
eval_iters = 1
device = "cpu"
[arms]
low = { learning_rate = 1e-3 }
high = { learning_rate = 1e-2 }
"""
Curves = dict[str, list[tuple[int, float]]]
# The names of docs/guide/trackers.md, by the field in the record's file.
NAMES = {
    "iteration": {
        "loss": "train/loss",
        "learning_rate": "train/learning_rate",
        "grad_norm": "train/grad_norm",
        "tokens": "train/tokens",
        "tokens_per_second": "speed/tokens_per_second",
        "step_seconds": "speed/step_seconds",
        "peak_memory_bytes": "memory/peak_bytes",
    },
    "evaluation": {"train_loss": "evaluation/train_loss", "val_loss": "evaluation/val_loss"},
}
CLOCKS = ("speed/", "memory/", "final/")


def needs(module: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(absent, reason=f"{module} is not installed")


@pytest.fixture(scope="module")
def config(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return TrainConfig(
        model=TINY,
        data_dir=dataset.folder,
        out_dir=tmp_path_factory.mktemp("tracked") / "runs/a",
        max_iters=12,
        batch_size=4,
        gradient_accumulation_steps=1,
        block_size=16,
        eval_interval=4,
        eval_iters=1,
        device="cpu",
    )


@pytest.fixture(scope="module")
def run(config: TrainConfig) -> Path:
    return train(config).folder


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    # A database takes MLflow half a minute to make; MLFLOW_ALLOW_FILE_STORE is its own switch.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for name in ("HF_TOKEN", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def recorded(run: Path) -> Curves:
    """The curves of a run, from its file."""
    curves: Curves = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for field, name in NAMES[row["kind"]].items():
            curves.setdefault(name, []).append((row["iteration"], float(row[field])))
    summary = json.loads((run / "summary.json").read_text())
    for name in ("loss", "perplexity", "bits_per_byte"):
        value = summary["validation"][name]
        curves[f"final/validation/{name}"] = [(summary["iterations"], value)]
    return curves


def in_tensorboard(run: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = Path("tensorboard").rglob("events.*")
    accumulator = EventAccumulator(str(file.parent), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    texts = accumulator.Tags()["tensors"]
    assert {"config", "samples/1", "samples/2", "samples/3"} <= set(texts)
    (sample,) = accumulator.Tensors("samples/1")
    story = json.loads((run / "summary.json").read_text())["samples"][0]["text"]
    assert story.splitlines()[0] in sample.tensor_proto.string_val[0].decode()
    scalars = accumulator.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in scalars}


def in_mlflow(run: Path) -> Curves:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("storylab")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == run.name
    assert found.data.params["n_layer"] == "2" and "out_dir" not in found.data.params
    names = {file.path for file in client.list_artifacts(found.info.run_id, "samples")}
    assert names == {f"samples/{number}.txt" for number in (1, 2, 3)}
    histories = {
        key: client.get_metric_history(found.info.run_id, key) for key in found.data.metrics
    }
    return {key: sorted((m.step, m.value) for m in history) for key, history in histories.items()}


def in_trackio(run: Path) -> Curves:
    with sqlite3.connect(Path("trackio/storylab.db")) as database:
        rows = database.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY id"
        ).fetchall()
        (stored,) = database.execute("SELECT config FROM configs").fetchall()
    assert {name for name, _, _ in rows} == {f"{run.name}-{run_identity(run)[:8]}"}
    assert json.loads(stored[0])["n_layer"] == 2
    return merged((step, json.loads(metrics)) for _, step, metrics in rows)


def in_wandb(run: Path) -> Curves:
    from wandb.proto.wandb_internal_pb2 import Record

    (folder,) = Path("wandb").glob("offline-run-*")
    identity = run_identity(run)
    assert folder.name.endswith(f"-{identity}")
    history: list[tuple[int, dict[str, Any]]] = []
    summary: dict[str, Any] = {}
    for data in leveldb_records((folder / f"run-{identity}.wandb").read_bytes()):
        record = Record.FromString(data)
        items = [("/".join(i.nested_key) or i.key, i.value_json) for i in record.history.item]
        if items:
            history.append((record.history.step.num, {k: json.loads(v) for k, v in items}))
        for item in record.summary.update:
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert summary["final/status"] == "finished"
    end = json.loads((run / "summary.json").read_text())["iterations"]
    final = {k: v for k, v in summary.items() if k.startswith("final/")}
    return merged([*history, (end, final)])


READERS = {
    "tensorboard": in_tensorboard,
    "mlflow": in_mlflow,
    "trackio": in_trackio,
    "wandb": in_wandb,
}
EACH = pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in READERS])


def merged(rows: Any) -> Curves:
    curves: Curves = {}
    for step, values in rows:
        for name, value in values.items():
            if isinstance(value, (int, float)) and not name.startswith("_"):
                curves.setdefault(name, []).append((step, float(value)))
    return curves


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after W&B's seven bytes of its own."""
    assert data[:4] == b":W&B"
    block, position, parts = 32768, 7, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # the rest of a block is padding
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def run_identity(run: Path) -> str:
    return tracked_run(run, place_of(run)).id


def assert_equal(found: Curves, expected: Curves, clocks: bool = True) -> None:
    for name, points in expected.items():
        if not clocks and name.startswith(CLOCKS):
            assert [step for step, _ in found[name]] == [step for step, _ in points], name
            continue
        steps, values = zip(*found[name], strict=True)
        assert list(steps) == [step for step, _ in points], name
        # TensorBoard keeps single precision.
        assert np.allclose(values, [v for _, v in points], rtol=2e-7, atol=0), name


@pytest.mark.slow
@EACH
def test_a_finished_run_is_sent_whole_and_twice_is_the_same(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["sync", str(run), "--to", name]) == 0, capsys.readouterr().err
        assert_equal(READERS[name](run), recorded(run))
    for file in Path().rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


class StopAfter(Observer):
    """Stops a run at an iteration after its checkpoint, as a kill would."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def row(self, row: object) -> None:
        if isinstance(row, IterationRow) and row.iteration == self.iteration:
            os.kill(os.getpid(), 15)


@pytest.mark.slow
@pytest.mark.posix
@EACH
def test_a_resumed_run_goes_on_as_the_same_run(
    name: str, config: TrainConfig, tmp_path: Path
) -> None:
    """The iterations after an older checkpoint are trained and sent again, and are there once."""
    folder = tmp_path / "runs/b"
    config = TrainConfig(**{**vars(config), "out_dir": folder})
    with pytest.raises(Interrupted):
        train(config, patient(name), StopAfter(10), Older(folder, 6))
    with_older(folder)
    resume(folder, None, patient(name))
    lines = (folder / "log.txt").read_text()
    assert "no longer watches" not in lines
    assert_equal(READERS[name](folder), recorded(folder), clocks=False)


def patient(name: str) -> TrackerObserver:
    """A tracker that gets its time on a busy machine."""
    return TrackerObserver(name, end_seconds=300, stop_seconds=300)


class Older(Observer):
    """Keeps a copy of the last checkpoint at an iteration."""

    def __init__(self, folder: Path, iteration: int) -> None:
        self.folder, self.iteration = folder, iteration

    def row(self, row: object) -> None:
        if isinstance(row, IterationRow) and row.iteration == self.iteration:
            last = self.folder / "checkpoints/last.safetensors"
            last.with_name("older").write_bytes(last.read_bytes())


def with_older(folder: Path) -> None:
    (folder / "checkpoints/older").replace(folder / "checkpoints/last.safetensors")


@pytest.mark.slow
@needs("tensorboard")
def test_an_experiment_is_a_project_and_its_arms_are_groups(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rates.toml").write_text(EXPERIMENT)
    words = ["experiment", "run", "rates.toml", "--data_dir", str(dataset.folder)]

    def answer(job: Job) -> Outcome:
        """Train, from the text that another process would get; calibrate nothing."""
        if job.action != "train":
            return Outcome("failed", "not now")
        return perform_quietly(Job.from_json(job.to_json()))

    assert main([*words, "--track", "tensorboard"], InProcess(answer)) == 0, capsys.readouterr().err
    folders = {file.parent.relative_to("tensorboard") for file in Path("tensorboard").rglob("ev*")}
    assert {folder.parts[:2] for folder in folders} == {("rates", "low"), ("rates", "high")}
    assert all(folder.name.startswith(f"{folder.parts[1]}, seed 1-") for folder in folders)
    # A tracker is no part of a run: the plan without one has the same folders.
    planned = plan_runs(load_experiment(Path("rates.toml")), dataset, Path("runs"))
    assert {run.folder for run in planned} == set(Path("runs").glob("nano-*"))
    # Sent again, a run has the same place.
    for run in Path("runs").glob("nano-*"):
        assert main(["sync", str(run), "--to", "tensorboard"]) == 0
    again = {file.parent.relative_to("tensorboard") for file in Path("tensorboard").rglob("ev*")}
    assert again == folders
