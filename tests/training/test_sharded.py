"""One run on several processes that share its weights and optimizer state (``--parallel fsdp``)."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from finished_runs import found, metrics, weights
from samples import TINY
from several_ranks import COMMON, answer, command, launch, numbers, step
from storylab.config import TrainConfig
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments.confounds import loss_confounds
from storylab.record.checkpoint import load
from storylab.record.folder import RunFolder, open_run
from storylab.record.run import load_run
from storylab.training.precision import choose_precision
from storylab.training.resume import resume
from storylab.training.sharded import ShardedRanks
from storylab.training.train import train

# An evaluation has a single batch, so that the ranks differ in their numbers of forward passes.
MODEL = {"model": TINY, "parallel": "fsdp", "eval_iters": 1}
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"grad_clip": 0.5},
    "normuon": {"optimizer": "normuon", "ema_fraction": 0.5},
}
# As for whole weights: rounding differences grow along a run.
NEAR = {"adamw": 1e-5, "normuon": 1e-3}

pytestmark = [pytest.mark.slow, pytest.mark.posix]


@pytest.fixture(scope="module")
def config(
    dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], TrainConfig]:
    root = tmp_path_factory.mktemp("sharded")

    def make(place: str, name: str) -> TrainConfig:
        (root / place).mkdir(exist_ok=True)
        folders = {"data_dir": dataset.folder, "out_dir": root / place / name}
        return TrainConfig(**(COMMON | MODEL | RUNS[name.partition("-")[0]] | folders))

    return make


@pytest.fixture(scope="module")
def one(config: Callable[[str, str], TrainConfig]) -> Path:
    """The runs of one process, which has nothing to share."""
    for name in RUNS:
        train(config("one", name))
    return config("one", "adamw").out_dir.parent  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def two(config: Callable[[str, str], TrainConfig]) -> Path:
    """The runs of two processes, each of its own torchrun, as on two machines; one run was stopped and
    continued."""
    stopped = config("two", "normuon-stopped")
    folder = stopped.out_dir
    assert folder is not None
    steps = {name: step(config("two", name), at=3) for name in RUNS}
    stop = {"at": 5, "signal": signal.SIGTERM, "rank": 1}
    steps["stop"] = step(stopped, **stop, clock=str(folder.parent / "clock"))
    for name in ("for-one", "for-three"):
        steps[name] = {"do": "copy", "from": str(folder), "to": str(folder.parent / name)}
    steps["resume"] = {"do": "resume", "folder": str(folder)}
    code, output = launch(1, folder.parent, plan(folder.parent, steps), nodes=2)
    assert code == 0, output
    return folder.parent


@pytest.fixture(scope="module")
def three(config: Callable[[str, str], TrainConfig], two: Path) -> Path:
    """Runs of three processes, whose shares of a matrix differ in size; one continues a run of two."""
    folder = config("three", "normuon").out_dir
    assert folder is not None
    steps = {"normuon": step(config("three", "normuon"))}
    steps["resume"] = {"do": "resume", "folder": str(two / "for-three")}
    steps["evaluate"] = {**step(config("three", "normuon")), "do": "evaluate"}
    code, output = launch(3, folder.parent, plan(folder.parent, steps))
    assert code == 0, output
    return folder.parent


def plan(out: Path, steps: dict[str, Any]) -> dict[str, Any]:
    return {"out": str(out), "parallel": "fsdp", "steps": steps}


@pytest.mark.parametrize(
    ("count", "name"), [("two", "adamw"), ("two", "normuon"), ("three", "normuon")]
)
def test_shares_train_as_whole_weights(
    count: str, name: str, one: Path, request: pytest.FixtureRequest
) -> None:
    several: Path = request.getfixturevalue(count)
    a, b = RunFolder(one / name), RunFolder(several / name)
    for key in ("loss", "grad_norm", "val_loss"):
        assert numbers(b, key) == pytest.approx(numbers(a, key), rel=NEAR[name]), key
    assert numbers(b, "grad_norm")[0] == pytest.approx(numbers(a, "grad_norm")[0], rel=2e-6)
    alone, together = found(a).validation, found(b).validation
    assert alone is not None and together is not None
    assert together.loss == pytest.approx(alone.loss, rel=NEAR[name])
    environment = b.read_environment()
    assert environment.parallel == "fsdp"
    assert environment.initial_weights_sha256 == a.read_environment().initial_weights_sha256


def test_checkpoints_hold_whole_tensors(one: Path, two: Path) -> None:
    for name in RUNS:
        (ours, _), (theirs, _) = (
            load(RunFolder(folder / name).checkpoint("last")) for folder in (one, two)
        )
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
            n: (t.shape, t.dtype) for n, t in theirs.items()
        }


def test_gradients_are_reduced_once_an_iteration(two: Path) -> None:
    parameters = found(RunFolder(two / "adamw")).parameters
    vectors = TINY.n_embd * (2 * TINY.n_layer + 1)
    for rank in (0, 1):
        reduced = answer(two, "adamw", rank)["reduced"]
        scattered = [count for kind, count in reduced if kind == "scattered"]
        # Three micro-batches, but one sum for every block, and one for the embedding.
        assert len(scattered) == TINY.n_layer + 1
        assert sum(scattered) == parameters - vectors
        # The vectors with the loss, and the square of the norm.
        summed = [count for kind, count in reduced if kind == "torch.float32"]
        assert summed == [vectors + 1, 1]


def test_evaluation_is_divided_and_counted_once(three: Path, dataset: Dataset) -> None:
    windows = -(-(len(dataset.splits["validation"]) - 1) // COMMON["block_size"])
    answers = [answer(three, "evaluate", rank) for rank in range(3)]
    assert all(each["same"] for each in answers)
    assert sum(each["windows"] for each in answers) == windows


def test_a_stopped_run_goes_on_with_any_number_of_processes_and_with_whole_weights(
    one: Path, two: Path, three: Path
) -> None:
    straight, resumed = open_run(two / "normuon"), open_run(two / "normuon-stopped")
    assert metrics(resumed) == metrics(straight) and weights(resumed) == weights(straight)
    alone = numbers(RunFolder(one / "normuon"), "loss")
    assert numbers(open_run(two / "for-three"), "loss") == pytest.approx(alone, rel=1e-3)
    by_one = resume(two / "for-one")
    assert numbers(by_one, "loss") == pytest.approx(alone, rel=1e-3)


def test_a_killed_process_ends_those_of_the_other_machine_and_the_run_can_go_on(
    one: Path, dataset: Dataset, tmp_path: Path
) -> None:
    folder, clock = tmp_path / "killed", tmp_path / "clock"
    flags = command(folder, dataset.folder, parallel="fsdp", **RUNS["adamw"])
    kill = {"at": 6, "signal": signal.SIGKILL, "rank": 1, "clock": str(clock)}
    code, output = launch(1, tmp_path, {"command": flags, "out": str(tmp_path), **kill}, nodes=2)
    assert code != 0
    survivor = answer(tmp_path, "first", 0)
    assert survivor["code"] == 128 + signal.SIGTERM
    assert survivor["ended"] - float(clock.read_text()) < 15
    assert "another process of this run has ended" in output
    run = resume(folder)
    assert [stage.iteration for stage in run.read_environment().resumed] == [5]
    alone = numbers(RunFolder(one / "adamw"), "loss")
    assert numbers(run, "loss") == pytest.approx(alone, rel=NEAR["adamw"])


def test_ways_of_sharing_that_differ_are_a_confound(two: Path) -> None:
    sharded = load_run(two / "adamw")
    environment = msgspec.structs.replace(sharded.environment, parallel="ddp")
    whole = dataclasses.replace(sharded, environment=environment)
    assert "parallel: fsdp against ddp" in loss_confounds(sharded, whole, frozenset(), True)
    same = loss_confounds(sharded, sharded, frozenset(), True)
    assert not any("parallel" in confound for confound in same)


@pytest.mark.parametrize("dtype", ["float16", "fp8"])
def test_other_precisions_are_refused_in_one_line(
    dtype: Any, config: Callable[[str, str], TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    backend = "emulated" if dtype == "fp8" else "auto"
    precision = choose_precision(torch.device("cpu"), dtype, "", backend)
    wanted = dataclasses.replace(config("one", "adamw"), dtype=dtype, backend=backend)
    with pytest.raises(UserError, match="--parallel fsdp is for --dtype bfloat16 and float32"):
        ShardedRanks().require(wanted, precision)
