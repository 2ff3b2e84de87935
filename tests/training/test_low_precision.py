"""Runs in low precision: they learn, resume to the same bits and record their statistics."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from record_folders import forget_checksums
from samples import TINY
from storylab.config import TrainConfig
from storylab.errors import Interrupted, UserError
from storylab.precision.recipes import (
    RECIPES,
)
from storylab.record.folder import RunFolder
from storylab.record.schema import EvaluationRow, IterationRow, QuantizationRow
from storylab.training import run_progress
from storylab.training.resume import resume
from storylab.training.train import train

LOW = tuple(RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW)
def test_a_low_precision_run_learns_and_resumes_to_the_same_bits(
    dtype: Any, tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    whole = train(tiny_config(dtype=dtype, out_dir=tmp_path / "whole"))
    summary = whole.read_summary()
    assert summary is not None and summary.validation is not None and summary.emulated
    first, last = whole.read_rows()[0].loss, whole.read_rows()[-1].loss
    assert last < first - 0.3
    # Evaluated in the same way for every arm, and in its own precision too.
    own = summary.validation_own_precision.loss
    assert own != summary.validation.loss and abs(own - summary.validation.loss) < 0.05
    short = train(
        tiny_config(dtype=dtype, out_dir=tmp_path / "short", max_iters=4, schedule="constant")
    )
    longer = dataclasses.replace(short.read_config(), max_iters=8)
    resumed = resume(short.folder, longer)
    straight = train(tiny_config(dtype=dtype, out_dir=tmp_path / "straight", schedule="constant"))

    def losses(run: RunFolder) -> list[float]:
        return [row.loss for row in run.read_rows() if isinstance(row, IterationRow)]

    assert losses(resumed) == losses(straight)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [6, 7, 11])
@pytest.mark.parametrize("dtype", ["fp8", "nvfp4"])
def test_a_run_stopped_within_an_iteration_resumes_to_the_same_bits(
    dtype: Any,
    calls: int,
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Delayed scales have then been noted for half of the iteration's micro-batches."""
    split = {"dtype": dtype, "batch_size": 2, "gradient_accumulation_steps": 2, "max_iters": 6}
    split["recipe"] = "low_forward_share=0.5" if dtype == "nvfp4" else "history=2"
    straight = train(tiny_config(out_dir=tmp_path / "straight", **split))
    original, left = run_progress.StopSignal.check, iter(range(calls))

    def check(self: run_progress.StopSignal) -> None:
        if next(left, None) is None and self.number is None:
            self.number = signal.SIGTERM
        original(self)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        # The signal comes at an exact place within an iteration.
        patch.setattr(run_progress.StopSignal, "check", check)
        train(tiny_config(out_dir=tmp_path / "stopped", **split))
    resumed = resume(tmp_path / "stopped")

    def numbers(run: RunFolder) -> list[Any]:
        keys = ("loss", "train_loss", "val_loss")
        return [[getattr(row, key, None) for key in keys] for row in run.read_rows()]

    assert numbers(resumed) == numbers(straight)
    resumed_summary, straight_summary = resumed.read_summary(), straight.read_summary()
    assert resumed_summary is not None and straight_summary is not None
    for key in ("validation", "validation_own_precision"):
        assert getattr(resumed_summary, key) == getattr(straight_summary, key)


@pytest.mark.slow
def test_a_run_from_before_there_were_backends_was_emulated(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = train(tiny_config(dtype="mxfp8", out_dir=tmp_path / "run", max_iters=1))
    forget_checksums(run.folder)
    values = json.loads((run.folder / "config.json").read_text())
    del values["backend"], values["quantization_stats"]
    (run.folder / "config.json").write_text(json.dumps(values))
    assert run.read_config().backend == "emulated"
    resume(run.folder)


@pytest.mark.slow
def test_a_longer_run_may_not_move_the_switch_to_bfloat16(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    recipe = {"dtype": "nvfp4", "recipe": "low_forward_share=0.5", "schedule": "constant"}
    run = train(tiny_config(out_dir=tmp_path / "run", max_iters=2, **recipe))
    with pytest.raises(UserError, match="low_forward_share"):
        resume(run.folder, dataclasses.replace(run.read_config(), max_iters=4))


@pytest.mark.slow
def test_what_was_asked_of_every_tensor_is_in_the_metrics(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = train(tiny_config(dtype="mxfp8", out_dir=tmp_path / "run", quantization_stats=True))
    rows = [row for row in run.read_rows() if isinstance(row, QuantizationRow)]
    evaluations = [row.iteration for row in run.read_rows() if isinstance(row, EvaluationRow)]
    products: dict[int, set[tuple[str, str]]] = {}
    for row in rows:
        products.setdefault(row.iteration, set()).add((row.tensor, row.product))
    assert sorted(products) == [0, *evaluations]
    # An evaluation just before takes nothing away from what training is seen to quantise.
    assert all(found == products[0] and len(found) == 6 for found in products.values())
    assert len({row.layer for row in rows}) == 4 * TINY.n_layer
    assert all(0 < row.error < 0.05 for row in rows if row.tensor != "gradient")
    assert (run.folder / "precision.json").exists()
    assert "self-test passed" in (run.folder / "log.txt").read_text()


@pytest.mark.slow
def test_arms_of_other_precisions_share_initial_weights(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    hashes = {
        train(tiny_config(dtype=dtype, out_dir=tmp_path / dtype, max_iters=1))
        .read_environment()
        .initial_weights_sha256
        for dtype in ("bfloat16", "fp8", "nvfp4")
    }
    assert len(hashes) == 1
