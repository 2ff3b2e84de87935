"""One run on several processes: as one process's run, reduced once an iteration, stopped and killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bad_batches import poisoned
from finished_runs import found, metrics, weights
from samples import TINY
from several_ranks import COMMON, answer, command, launch, numbers, step
from storylab.config import TrainConfig, to_dict
from storylab.data.batches import TrainingBatches
from storylab.data.dataset import Dataset
from storylab.experiments.confounds import loss_confounds, speed_confounds
from storylab.model.transformer import Transformer
from storylab.record.folder import RunFolder, open_run
from storylab.record.run import load_run
from storylab.record.schema import Environment, IterationRow
from storylab.training.observers import Observer
from storylab.training.resume import resume
from storylab.training.train import train

RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"grad_clip": 0.5},
    "normuon": {"optimizer": "normuon", "ema_fraction": 0.5},
    "fp8": {"dtype": "fp8", "backend": "emulated", "recipe": "history=3", "max_iters": 4},
    "nvfp4": {"dtype": "nvfp4", "backend": "emulated", "max_iters": 4},
}
RECOVERING = {name: {"on_divergence": name} for name in ("skip", "rewind")}
KINDS = {**RUNS, **RECOVERING}
BAD = 6  # number of the batch that has no finite loss
# Rounding differences of 1e-7 grow along a run, and faster where they move a value to another step of FP8.
NEAR = {"adamw": 1e-5, "normuon": 1e-3, "fp8": 1e-3, "nvfp4": 1e-3}

pytestmark = [pytest.mark.slow, pytest.mark.posix]


@pytest.fixture(scope="module")
def config(
    dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], TrainConfig]:
    root = tmp_path_factory.mktemp("ranks")

    def make(place: str, name: str) -> TrainConfig:
        (root / place).mkdir(exist_ok=True)
        folders = {"data_dir": dataset.folder, "out_dir": root / place / name}
        return TrainConfig(**(COMMON | KINDS[name.partition("-")[0]] | folders))

    return make


@pytest.fixture(scope="module")
def one(config: Callable[[str, str], TrainConfig]) -> Path:
    """The runs of one process."""
    for name in RUNS:
        train(config("one", name))
    return config("one", "adamw").out_dir.parent  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def two(config: Callable[[str, str], TrainConfig]) -> Path:
    """The runs of two processes, one of which was stopped by a signal to its second process."""
    stopped = config("two", "normuon-stopped")
    steps = {name: step(config("two", name), at=3) for name in RUNS}
    stop = {"at": 5, "signal": signal.SIGTERM, "rank": 1}
    folder = stopped.out_dir
    assert folder is not None
    steps["stop"] = step(stopped, **stop, clock=str(folder.parent / "clock"))
    for name in ("for-one", "for-four"):
        steps[name] = {"do": "copy", "from": str(folder), "to": str(folder.parent / name)}
    steps["resume"] = {"do": "resume", "folder": str(folder)}
    for name in RECOVERING:
        steps[name] = step(config("two", name), bad=[BAD])
    steps |= {name: {"do": name} for name in ("divide", "evaluate")}
    steps["evaluate"]["config"] = to_dict(config("two", "adamw"))
    code, output = launch(2, folder.parent, {"out": str(folder.parent), "steps": steps})
    assert code == 0, output
    return folder.parent


@pytest.fixture(scope="module")
def four(config: Callable[[str, str], TrainConfig], two: Path) -> Path:
    """Runs of four processes, which have two micro-batches or one; one continues a run of two processes."""
    folder = config("four", "adamw").out_dir
    assert folder is not None
    steps = {name: step(config("four", name)) for name in RUNS}
    steps |= {name: {"do": name} for name in ("divide", "evaluate")}
    steps["resume"] = {"do": "resume", "folder": str(two / "for-four")}
    steps["evaluate"]["config"] = to_dict(config("four", "adamw"))
    code, output = launch(4, folder.parent, {"out": str(folder.parent), "steps": steps})
    assert code == 0, output
    return folder.parent


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("count", ["two", "four"])
def test_several_processes_train_as_one(
    name: str, count: str, one: Path, request: pytest.FixtureRequest
) -> None:
    several: Path = request.getfixturevalue(count)
    a, b = RunFolder(one / name), RunFolder(several / name)
    for key in ("loss", "grad_norm", "val_loss"):
        ours = numbers(b, key)
        assert ours == pytest.approx(numbers(a, key), rel=NEAR[name]), key
    # Before the first update there is nothing to grow: scales and random draws are those of one process.
    assert numbers(b, "grad_norm")[0] == pytest.approx(numbers(a, "grad_norm")[0], rel=2e-6)
    alone, together = found(a).validation, found(b).validation
    assert alone is not None and together is not None
    assert together.loss == pytest.approx(alone.loss, rel=NEAR[name])
    assert (together.stories, together.tokens) == (alone.stories, alone.tokens)
    ours, theirs = a.read_environment(), b.read_environment()
    assert (ours.world_size, theirs.world_size) == (1, {"two": 2, "four": 4}[count])
    assert ours.first_batch_sha256 == theirs.first_batch_sha256
    assert ours.initial_weights_sha256 == theirs.initial_weights_sha256


@pytest.mark.parametrize("name", RECOVERING)
def test_several_processes_recover_as_one(
    name: str, two: Path, config: Callable[[str, str], TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch's loss is NaN in the second process alone."""
    make, forward = poisoned([BAD])
    monkeypatch.setattr(TrainingBatches, "__call__", make)
    monkeypatch.setattr(Transformer, "forward", forward)
    alone, together = train(config("one", name)), RunFolder(two / name)
    for key in ("loss", "grad_norm", "val_loss"):
        assert numbers(together, key) == pytest.approx(numbers(alone, key), rel=NEAR["adamw"]), key
    ours, theirs = found(together), found(alone)
    assert (ours.skipped_steps, ours.rewinds) == (theirs.skipped_steps, theirs.rewinds)
    assert ours.skipped_steps + len(ours.rewinds) == 1


def test_gradients_are_summed_once_an_iteration(two: Path) -> None:
    parameters = found(RunFolder(two / "adamw")).parameters
    for rank in (0, 1):
        reduced = answer(two, "adamw", rank)["reduced"]
        summed = [count for dtype, count in reduced if dtype == "torch.float32"]
        assert sum(summed) == parameters + 1  # and the loss
        # Three micro-batches, but one sum for every matrix, and one for the vectors.
        assert len(summed) == 4 * TINY.n_layer + 2
        assert [count for dtype, count in reduced if dtype != "torch.float32"] == [1]  # the stop


def test_orthogonalization_divided_between_processes_has_the_same_bits(
    two: Path, four: Path
) -> None:
    for folder, size in ((two, 2), (four, 4)):
        for rank in range(size):
            assert all(answer(folder, "divide", rank)["equal"])


def test_evaluation_is_divided_and_counted_once(two: Path, four: Path, dataset: Dataset) -> None:
    windows = -(-(len(dataset.splits["validation"]) - 1) // COMMON["block_size"])
    for folder, size in ((two, 2), (four, 4)):
        found = [answer(folder, "evaluate", rank) for rank in range(size)]
        assert all(each["same"] for each in found)
        assert sum(each["windows"] for each in found) == windows
        assert len({each["ticks"] for each in found}) == 1
        assert max(each["windows"] for each in found) < windows


def test_a_signal_to_one_process_stops_all_and_the_resumed_run_has_the_same_bits(
    two: Path,
) -> None:
    for rank in (0, 1):
        stopped = answer(two, "stop", rank)
        assert stopped["code"] == 128 + signal.SIGTERM
        assert "Stopped before iteration 5" in stopped["stopped"]
    straight, resumed = open_run(two / "normuon"), open_run(two / "normuon-stopped")
    assert metrics(resumed) == metrics(straight) and weights(resumed) == weights(straight)
    again = resumed.read_environment().resumed
    assert [(stage.iteration, stage.world_size) for stage in again] == [(5, 2)]


class Lines(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_another_number_of_processes_goes_on_with_the_same_batches(
    two: Path, four: Path, one: Path
) -> None:
    """Five iterations of two processes; the others of one, and of four."""
    seen = Lines()
    by_one = resume(two / "for-one", None, seen)
    assert "The number of processes is not that of the run's start: bits may differ" in seen.lines
    for run, size in ((by_one, 1), (open_run(two / "for-four"), 4)):
        alone = RunFolder(one / "normuon")
        assert numbers(run, "loss") == pytest.approx(numbers(alone, "loss"), rel=NEAR["normuon"])
        assert [stage.world_size for stage in run.read_environment().resumed] == [size]
    assert answer(four, "resume", 0) == {"reduced": []}


def test_a_killed_process_ends_the_others_and_torchrun_brings_the_run_back(
    two: Path, dataset: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    plan = {
        "command": command(folder, dataset.folder, **RUNS["adamw"]),
        "out": str(tmp_path),
        "at": 6,
        "signal": signal.SIGKILL,
        "rank": 1,
        "clock": str(tmp_path / "clock"),
    }
    code, output = launch(2, tmp_path, plan, "--max-restarts", "1")
    assert code == 0, output
    killed = float((tmp_path / "clock").read_text())
    survivor = answer(tmp_path, "first", 0)
    assert survivor["code"] == 128 + signal.SIGTERM and survivor["ended"] - killed < 15
    assert "another process of this run has ended" in output
    assert [answer(tmp_path, "again", rank)["code"] for rank in (0, 1)] == [0, 0]
    # From the checkpoint of the evaluation at iteration 4, to the bits of a run that nobody killed.
    run, straight = open_run(folder), open_run(two / "adamw")
    assert [stage.iteration for stage in run.read_environment().resumed] == [5]
    assert metrics(run) == metrics(straight) and weights(run) == weights(straight)


def test_the_first_process_alone_prints_and_writes(two: Path) -> None:
    log = (two / "adamw" / "log.txt").read_text()
    assert log.count("Step 4:") == 1 and log.count("iter 12:") == 1
    iterations = [
        row for row in RunFolder(two / "adamw").read_rows() if isinstance(row, IterationRow)
    ]
    assert [row.iteration for row in iterations] == list(range(COMMON["max_iters"] + 1))


def test_memory_is_that_of_all_processes(two: Path, four: Path) -> None:
    peaks = [found(RunFolder(folder / "adamw")).peak_memory_bytes for folder in (two, four)]
    assert 1.5 < peaks[1] / peaks[0] < 3


def test_numbers_of_processes_that_differ_are_a_confound(one: Path, two: Path) -> None:
    a, b = load_run(one / "adamw"), load_run(two / "adamw")
    for confounds in (loss_confounds(a, b, frozenset(), True), speed_confounds(a, b)):
        assert "world_size: 1 against 2" in confounds
    assert "world_size" not in " ".join(loss_confounds(b, b, frozenset(), True))


def test_records_from_before_several_processes_are_of_one(one: Path) -> None:
    values = json.loads((one / "adamw" / "environment.json").read_text())
    del values["world_size"]
    assert msgspec.convert(values, Environment).world_size == 1
