"""The training loop: divergence, steps that run ahead of the host, and stops."""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finished_runs import CPU, InterruptAt, found, metrics, weights
from samples import MakeConfig
from storylab.errors import Diverged, Interrupted
from storylab.record.folder import open_run
from storylab.record.schema import IterationRow
from storylab.training import run_progress
from storylab.training.evaluation import Evaluation, evaluate_run
from storylab.training.resume import resume
from storylab.training.run_progress import InFlightStep, StepsInFlight, StopRequested
from storylab.training.step import DeviceStepMetrics, NonFiniteError, training_step
from storylab.training.train import train


def test_divergence_is_reported_and_the_weights_from_before_are_kept(
    tiny_config: MakeConfig,
) -> None:
    config = tiny_config(learning_rate=1e30, grad_clip=0.0, warmup_iters=0)
    with pytest.raises(Diverged, match="learning_rate"):
        train(config)
    run = open_run(config.out_dir)
    assert found(run).status == "diverged"
    assert 0 < found(run).iterations == len(run.read_rows())
    again = evaluate_run(run.folder, device="cpu")
    assert math.isfinite(again.loss)


@pytest.mark.slow
def test_a_host_that_runs_ahead_writes_the_same_run(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: results are read when a line, an evaluation or a checkpoint is due."""
    config = {"max_iters": 11, "log_interval": 4, "eval_interval": 6}
    at_once = train(tiny_config(out_dir=tmp_path / "at-once", **config))
    # A CPU never runs ahead.
    monkeypatch.setattr(run_progress, "runs_ahead", lambda device: True)
    ahead = train(tiny_config(out_dir=tmp_path / "ahead", **config))
    assert metrics(ahead) == metrics(at_once) and weights(ahead) == weights(at_once)
    times = [row.step_seconds for row in ahead.read_rows() if isinstance(row, IterationRow)]
    assert times[1] == times[2] == times[3] == times[4] != times[5]
    with pytest.raises(Interrupted):
        train(tiny_config(out_dir=tmp_path / "stopped", **config), InterruptAt(5, signal.SIGTERM))
    resumed = resume(tmp_path / "stopped")
    assert metrics(resumed) == metrics(at_once) and weights(resumed) == weights(at_once)


def test_steps_in_flight_are_read_by_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[torch.Size] = []
    cpu = torch.Tensor.cpu
    # Nothing here has another device to copy from.
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or cpu(tensor)
    )
    flight = StepsInFlight(CPU)
    for i in range(5):
        loss, norm = torch.tensor(i / 7), torch.tensor(i / 3, dtype=torch.float64)
        result = DeviceStepMetrics(loss, norm if i != 3 else norm * math.nan, max_norm=0.5)
        flight.add(InFlightStep(i, result, 0.0), started=2.0 + i)
    done, since, fault = flight.read()
    assert copies == [(10,)] and since == 2.0 and "nan" in str(fault)
    assert [(step.iteration, step.result.read()) for step, _ in done] == [
        (i, metrics) for i, (_, metrics) in enumerate(done)
    ]
    assert len(done) == 3 and flight.read() == ([], 2.0, None)


def test_a_divergence_found_late_names_the_iteration_where_it_was(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU never runs ahead.
    monkeypatch.setattr(run_progress, "runs_ahead", lambda device: True)
    whole = training_step

    def poisoned(*args: Any, **values: Any) -> Any:
        result = whole(*args, **values)
        late = next(calls) == 3
        return dataclasses.replace(result, loss=result.loss * math.nan) if late else result

    calls = itertools.count()
    # One step that is not finite, at a known iteration.
    monkeypatch.setattr("storylab.training.state.training_step", poisoned)
    config = tiny_config(max_iters=20, log_interval=10, eval_interval=20)
    with pytest.raises(Diverged, match="iteration 3"):
        train(config)
    run = open_run(config.out_dir)
    assert found(run).iterations == len(run.read_rows()) == 3


@pytest.mark.parametrize("late", [True, False], ids=["when read", "in the step"])
def test_what_is_under_way_at_a_fault_or_a_stop_is_written_down(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """A fault that a stop finds among the unread, and one that float16 raises before they are read."""
    # A CPU never runs ahead.
    monkeypatch.setattr(run_progress, "runs_ahead", lambda device: True)
    whole = training_step

    def poisoned(*args: Any, **values: Any) -> Any:
        call = next(calls)
        if late and call == 5:
            raise StopRequested
        result = whole(*args, **values)
        if call != 3:
            return result
        if late:
            return dataclasses.replace(result, loss=result.loss * math.nan)
        raise NonFiniteError("gradient norm is nan at every float16 loss scale")

    calls = itertools.count()
    # One step that is not finite, at a known iteration.
    monkeypatch.setattr("storylab.training.state.training_step", poisoned)
    config = tiny_config(max_iters=20, log_interval=10, eval_interval=20)
    with pytest.raises(Diverged, match="iteration 3"):
        train(config)
    run = open_run(config.out_dir)
    assert found(run).status == "diverged"
    assert found(run).iterations == len(run.read_rows()) == 3


@pytest.mark.parametrize("which", ["estimate_loss", "evaluate_split"])
def test_an_evaluation_that_is_not_finite_is_a_divergence(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """During training and at the end: no best model of NaN, no traceback, no NaN in JSON."""
    nothing = (
        math.nan
        if which == "estimate_loss"
        else Evaluation(np.array([math.nan]), np.ones(1), np.zeros(1), 1)
    )
    # Weights that are finite give a loss that is; only the evaluation is to fail.
    monkeypatch.setattr(f"storylab.training.evaluator.{which}", lambda *_, **__: nothing)
    config = tiny_config()
    with pytest.raises(Diverged, match="loss is nan"):
        train(config)
    run = open_run(config.out_dir)
    assert run.checkpoint("best").exists() == (which == "evaluate_split")
    assert found(run).status == "diverged"
