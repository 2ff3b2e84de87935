"""Steps, evaluation, checkpoints and resuming: each against something that does not share its code."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import storylab
from conftest import TINY
from stepping import FLOAT32, VOCAB, batch, new, step
from storylab.compiler import missing_for_compiling
from storylab.config import TrainConfig
from storylab.data import builtin
from storylab.data.dataset import Dataset
from storylab.data.prepare import PrepareConfig
from storylab.errors import Diverged, Interrupted, UserError
from storylab.files import exclusive
from storylab.model.transformer import Transformer
from storylab.record import checkpoint
from storylab.record.folder import RunFolder, open_run
from storylab.record.provenance import NON_NUMERIC_MODULES, bare_source
from storylab.record.schema import EvaluationRow, IterationRow, Summary
from storylab.training import run_progress
from storylab.training.evaluation import Evaluation, estimate_loss, evaluate_run, evaluate_split
from storylab.training.observers import Observer
from storylab.training.precision import (
    choose_device,
    choose_precision,
)
from storylab.training.resume import resume
from storylab.training.run_progress import StopRequested
from storylab.training.sampling import load_story_model
from storylab.training.setup import TrainingSetup, resolve_compile
from storylab.training.step import NonFiniteError, training_step
from storylab.training.telemetry import PowerTotals, Telemetry
from storylab.training.train import train

MakeConfig = Callable[..., TrainConfig]
CPU = torch.device("cpu")


# --- the step


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_accumulated_micro_batches_equal_one_large_batch(micro_batch: int) -> None:
    (one, optimizers), (many, others) = new(), new()
    a = step(one, optimizers)
    b = step(many, others, micro_batch=micro_batch)
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)


def test_clipping_bounds_the_gradient_and_reports_the_norm_before() -> None:
    model, optimizers = new()
    free = step(model, optimizers, grad_clip=0.0)
    assert not free.clipped and free.grad_norm is not None
    model, optimizers = new()
    limit = free.grad_norm / 3
    clipped = step(model, optimizers, grad_clip=limit)
    assert clipped.clipped and clipped.grad_norm == pytest.approx(free.grad_norm)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()
                         if p.grad is not None))  # fmt: skip
    assert norm == pytest.approx(limit, rel=1e-3)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone() -> None:
    model, optimizers = new()
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="loss"):
        step(model, optimizers)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not optimizers[0].state


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_learns_like_float32(dtype: Any) -> None:
    losses = {}
    for name in ("float32", dtype):
        model, optimizers = new()
        precision = choose_precision(CPU, name)
        for _ in range(20):
            result = step(model, optimizers, precision=precision)
        losses[name] = result.loss
    assert losses["float32"] < 4.5 < math.log(VOCAB)
    assert losses[dtype] == pytest.approx(losses["float32"], abs=0.05)


def test_float16_skips_a_step_whose_scaled_gradient_overflows() -> None:
    model, optimizers = new()
    precision = choose_precision(CPU, "float16")
    scaler = precision.grad_scaler()
    scaler.scale(torch.zeros(1))  # makes the scale, which is lazy
    scaler.update(2.0**40)
    values = {"micro_batch": 8, "learning_rate": 1e-2, "grad_clip": 1.0}
    before = model.embedding.weight.clone()
    result = training_step(model, optimizers, scaler, precision, batch(), **values).read()  # type: ignore[arg-type]
    assert result.grad_norm is None and not result.clipped
    assert torch.equal(model.embedding.weight, before)
    assert scaler.get_scale() == 2.0**39


def test_devices_that_are_not_there_are_refused() -> None:
    for name in ("tpu", "cuda:99", "xpu"):
        with pytest.raises(UserError, match="use"):
            choose_device(name)
    if not torch.cuda.is_available():
        assert choose_device("auto") == CPU


def test_bfloat16_on_a_card_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="Tesla T4 has no bfloat16: use --dtype float16"):
        choose_precision(torch.device("cuda"), "bfloat16")
    assert choose_precision(torch.device("cuda"), "float16").dtype == torch.float16


# --- evaluation


def test_losses_of_stories_equal_a_plain_loop(dataset: Dataset) -> None:
    model, block = Transformer(TINY, VOCAB, seed=4), 16
    split = dataset.splits["validation"]
    result = evaluate_split(model, split, block, FLOAT32)
    ids = torch.from_numpy(split.read(0, len(split)))
    losses = np.full(len(ids), np.nan)
    starts = [*range(0, len(ids) - 1 - block, block), len(ids) - 1 - block]
    for start in starts:
        logits = model(ids[None, start : start + block])[0]
        targets = ids[start + 1 : start + block + 1]
        each = F.cross_entropy(logits, targets, reduction="none").detach().numpy()
        losses[start + 1 : start + block + 1] = each
    assert np.isnan(losses[0]) and not np.isnan(losses[1:]).any()
    losses[0] = 0.0  # nothing comes before the first token, so nothing predicts it
    story = np.cumsum(ids.numpy() == dataset.tokenizer.end_of_text)
    story = np.concatenate(([0], story[:-1]))
    np.testing.assert_allclose(result.story_losses, np.bincount(story, losses), rtol=1e-4)
    counts = np.bincount(story)
    counts[0] -= 1
    assert result.story_tokens.tolist() == counts.tolist()
    assert result.loss == pytest.approx(losses[1:].mean(), rel=1e-5)
    bits = losses.sum() / math.log(2) / dataset.manifest["splits"]["validation"]["text_bytes"]
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(losses[1:].mean()), rel=1e-4)


@pytest.mark.parametrize("block", [5, 16, 400, 900])
def test_aligned_windows_read_a_token_from_its_own_story_alone(
    dataset: Dataset, block: int
) -> None:
    """To the last story of the split, which windows that reach back would predict from others."""
    model = Transformer(TINY, VOCAB, seed=4)
    split = dataset.splits["validation"]
    result = evaluate_split(model, split, block, FLOAT32, aligned=True)
    ids = torch.from_numpy(split.read(0, len(split)))
    borders = [0, *(int(i) + 1 for i in (ids == dataset.tokenizer.end_of_text).nonzero())]
    at_position: list[list[float]] = [[] for _ in range(block)]
    for number, (begin, end) in enumerate(itertools.pairwise(borders)):
        start, total = max(begin - 1, 0), 0.0
        while start < end - 1:
            stop = min(start + block, end - 1)
            logits = model(ids[None, start:stop])[0]
            losses = F.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="none").tolist()
            for position, loss in enumerate(losses):
                at_position[position].append(loss)
            total += sum(losses)
            start = stop
        assert result.story_losses[number] == pytest.approx(total, rel=1e-4)
    assert number == len(result.story_losses) - 1
    means = [sum(some) / len(some) if some else math.nan for some in at_position]
    np.testing.assert_allclose(result.position_losses, means, rtol=1e-4)
    plain = evaluate_split(model, split, block, FLOAT32)
    np.testing.assert_array_equal(result.story_tokens, plain.story_tokens)


def test_the_standard_error_is_that_of_the_jackknife() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 300, 400)
    sums = tokens * rng.normal(2.0, 0.3, 400)
    result = Evaluation(sums, tokens, np.zeros(1), 1)
    n = len(sums)
    without = (sums.sum() - sums) / (tokens.sum() - tokens)
    jackknife = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    assert result.standard_error == pytest.approx(jackknife, rel=0.02)


def test_validation_loss_does_not_depend_on_the_batch_size(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, split = Transformer(TINY, VOCAB, seed=4), dataset.splits["validation"]
    losses = []
    for size in (64, 7, 1):
        monkeypatch.setattr("storylab.training.evaluation.EVAL_BATCH", size)
        losses.append(evaluate_split(model, split, 16, FLOAT32).loss)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


def test_evaluation_does_not_touch_the_training_order(tiny_config: MakeConfig) -> None:
    often, seldom = (
        train(tiny_config(out_dir=tiny_config().out_dir / str(n), eval_interval=n)) for n in (1, 8)
    )
    assert weights(often) == weights(seldom)


def test_the_estimate_is_the_mean_over_the_fixed_windows(dataset: Dataset) -> None:
    model, split = Transformer(TINY, VOCAB, seed=4), dataset.splits["train"]
    count = (len(split) - 1) // 16
    whole = evaluate_split(model, split, 16, FLOAT32).loss
    # More windows than there are: all of them, so the two must agree but for the tail.
    assert estimate_loss(model, split, 16, count, FLOAT32) == pytest.approx(whole, rel=1e-3)


# --- runs


def weights(run: RunFolder) -> str:
    return checkpoint.weights_sha256(checkpoint.load(run.checkpoint("last"))[0])


TIMES = {"tokens_per_second", "step_seconds", "data_seconds", "peak_memory_bytes"}


def found(run: RunFolder) -> Summary:
    """The summary of a run that has ended."""
    summary = run.read_summary()
    assert summary is not None
    return summary


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    """Metrics without what the clock decides."""
    rows = map(msgspec.to_builtins, run.read_rows())
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_a_run_writes_its_folder(tiny_config: MakeConfig, capsys: Any) -> None:
    config = tiny_config()
    run = train(config)
    assert capsys.readouterr() == ("", "")  # library code prints nothing
    assert run.read_config() == dataclasses.replace(config, data_seed=config.seed, compile=False)
    rows = [row for row in run.read_rows() if isinstance(row, IterationRow)]
    assert [row.iteration for row in rows] == list(range(9))
    assert [row.tokens for row in rows] == [(i + 1) * 128 for i in range(9)]
    evaluations = [row for row in run.read_rows() if isinstance(row, EvaluationRow)]
    assert [row.iteration for row in evaluations] == [4, 8]
    summary = run.read_summary()
    assert summary is not None and summary.status == "finished"
    assert summary.final_val_loss == evaluations[-1].val_loss
    assert summary.power_watts is None  # not known on a CPU, so not invented
    assert summary.tokens == 9 * 128
    lines = (run.folder / "log.txt").read_text().splitlines()
    starts = [line.split(":")[0] for line in lines if line.startswith(("iter", "Step"))]
    assert starts == ["iter 0", "iter 2", "Step 4", "iter 4", "iter 6", "Step 8", "iter 8"]
    assert "unknown on this device" in "\n".join(lines)
    environment = run.read_environment()
    assert environment.packages.torch == torch.__version__
    assert len(environment.code_sha256) == 64
    losses = np.load(run.folder / "story_losses.npy", allow_pickle=False)
    held_out = [hashlib.sha256(story.encode()).digest() for story in builtin.stories(0, 0, 15)]
    assert losses.shape == (sum(digest[-1] % 2 == 0 for digest in held_out), 2)
    assert losses[:, 0].sum() / losses[:, 1].sum() == summary.validation.loss
    assert not [p for p in run.folder.rglob("*") if p.name.endswith(".tmp")]


def test_the_printed_loss_is_the_mean_over_the_whole_batch(
    tiny_config: MakeConfig, dataset: Dataset
) -> None:
    config = tiny_config(max_iters=0)
    run = train(config)
    windows = TrainingSetup(run.read_config(), dataset, FLOAT32).batches(0)
    model = Transformer(TINY, VOCAB, seed=config.seed)
    expected = model.token_losses(windows[:, :-1], windows[:, 1:]).mean()
    assert run.read_rows()[0].loss == pytest.approx(float(expected), rel=1e-5)


def test_best_is_the_lowest_validation_loss_not_the_latest(tiny_config: MakeConfig) -> None:
    # A rate this high makes the loss go up and down.
    run = train(tiny_config(max_iters=20, eval_interval=2, learning_rate=0.5, schedule="constant"))
    losses = {r.iteration: r.val_loss for r in run.read_rows() if isinstance(r, EvaluationRow)}
    best = min(losses, key=lambda i: losses[i])
    _, state = checkpoint.load(run.checkpoint("best"))
    assert best != 20, "this test needs a run whose last loss is not its best"
    assert state == {"iteration": best, "val_loss": losses[best]}
    assert found(run).best_iteration == best


def test_a_run_can_be_repeated_bit_for_bit(tiny_config: MakeConfig, tmp_path: Path) -> None:
    runs = [train(tiny_config(out_dir=tmp_path / name)) for name in "ab"]
    assert weights(runs[0]) == weights(runs[1])
    assert metrics(runs[0]) == metrics(runs[1])


@pytest.mark.slow
def test_weight_and_data_seeds_are_separate(tiny_config: MakeConfig, tmp_path: Path) -> None:
    def identity(**seeds: int) -> tuple[str, str]:
        config = tiny_config(out_dir=tmp_path / str(seeds), max_iters=0, **seeds)
        environment = train(config).read_environment()
        return environment.initial_weights_sha256, environment.first_batch_sha256

    base, other_data = identity(seed=1, data_seed=1), identity(seed=1, data_seed=2)
    other_weights = identity(seed=2, data_seed=1)
    assert base[0] == other_data[0] != other_weights[0]
    assert base[1] == other_weights[1] != other_data[1]
    assert identity(seed=2) == identity(seed=2, data_seed=2)


def test_divergence_is_told_and_the_weights_from_before_are_kept(tiny_config: MakeConfig) -> None:
    config = tiny_config(learning_rate=1e30, grad_clip=0.0, warmup_iters=0)
    with pytest.raises(Diverged, match="learning_rate"):
        train(config)
    run = open_run(config.out_dir)
    assert found(run).status == "diverged"
    assert 0 < found(run).iterations == len(run.read_rows())
    again = evaluate_run(run.folder, device="cpu")
    assert math.isfinite(again.loss)


def test_a_host_that_runs_ahead_writes_the_same_run(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: results are read when a line, an evaluation or a checkpoint is due."""
    config = {"max_iters": 11, "log_interval": 4, "eval_interval": 6}
    at_once = train(tiny_config(out_dir=tmp_path / "at-once", **config))
    monkeypatch.setattr(run_progress, "runs_ahead", lambda device: True)
    ahead = train(tiny_config(out_dir=tmp_path / "ahead", **config))
    assert metrics(ahead) == metrics(at_once) and weights(ahead) == weights(at_once)
    times = [row.step_seconds for row in ahead.read_rows() if isinstance(row, IterationRow)]
    assert times[1] == times[2] == times[3] == times[4] != times[5]
    with pytest.raises(Interrupted):
        train(tiny_config(out_dir=tmp_path / "stopped", **config), InterruptAt(5, signal.SIGTERM))
    resumed = resume(tmp_path / "stopped")
    assert metrics(resumed) == metrics(at_once) and weights(resumed) == weights(at_once)


def test_a_divergence_found_late_is_told_of_the_iteration_where_it_was(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_progress, "runs_ahead", lambda device: True)
    whole = training_step

    def poisoned(*args: Any, **values: Any) -> Any:
        result = whole(*args, **values)
        late = next(calls) == 3
        return dataclasses.replace(result, loss=result.loss * math.nan) if late else result

    calls = itertools.count()
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
    """A fault that a stop finds among the unread, and one that float16 tells of before they are read."""
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
    monkeypatch.setattr("storylab.training.state.training_step", poisoned)
    config = tiny_config(max_iters=20, log_interval=10, eval_interval=20)
    with pytest.raises(Diverged, match="iteration 3"):
        train(config)
    run = open_run(config.out_dir)
    assert found(run).status == "diverged"
    assert found(run).iterations == len(run.read_rows()) == 3


@pytest.mark.parametrize(
    ("changes", "compiler", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"max_iters": 0, "gradient_accumulation_steps": 1}, True, False),
        ({"max_iters": 0, "gradient_accumulation_steps": 1, "compile": True}, True, True),
        ({"compile": False}, True, False),
        ({"dtype": "fp8"}, True, False),
    ],
)
def test_long_runs_are_compiled_where_they_can_be(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], compiler: bool, expected: bool
) -> None:
    missing = None if compiler else "a C++ compiler"
    monkeypatch.setattr("storylab.training.setup.missing_for_compiling", lambda device: missing)
    config = TrainConfig(device="cpu", **changes)
    precision = choose_precision(CPU, config.dtype)
    assert resolve_compile(config, precision) is expected


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
    monkeypatch.setattr(f"storylab.training.evaluator.{which}", lambda *a: nothing)
    config = tiny_config()
    with pytest.raises(Diverged, match="loss is nan"):
        train(config)
    run = open_run(config.out_dir)
    assert run.checkpoint("best").exists() == (which == "evaluate_split")
    assert found(run).status == "diverged"


class InterruptAt(Observer):
    """Sends this process a signal when an iteration has been done."""

    def __init__(self, iteration: int, number: int) -> None:
        self.iteration, self.number = iteration, number

    def progress(self, name: str, done: int, total: int) -> None:
        if name == "training" and done == self.iteration:
            signal.raise_signal(self.number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 4, 6, 9])
def test_a_stopped_run_resumes_to_the_same_bits(
    tiny_config: MakeConfig, tmp_path: Path, at: int, number: signal.Signals
) -> None:
    whole = train(tiny_config(out_dir=tmp_path / "whole"))
    config = tiny_config(out_dir=tmp_path / "stopped")
    with pytest.raises(Interrupted, match="storylab resume") as stop:
        train(config, InterruptAt(at, number))
    assert stop.value.signal_number == number
    assert open_run(config.out_dir).read_summary() is None
    run = resume(config.out_dir)
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)
    run_summary, whole_summary = run.read_summary(), whole.read_summary()
    assert run_summary is not None and whole_summary is not None
    assert found(run).validation == found(whole).validation
    assert found(run).best_val_loss == found(whole).best_val_loss
    assert found(run).samples == found(whole).samples
    assert run.read_environment().resumed[0].iteration == at


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"optimizer": "normuon"},
        {"average_share": 0.5},
        {"average_share": 0.2, "dtype": "mxfp8"},
    ],
    ids=str,
)
def test_a_run_with_other_parts_resumes_to_the_same_bits(
    tiny_config: MakeConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = train(tiny_config(**changes, out_dir=tmp_path / "whole"))
    config = tiny_config(**changes, out_dir=tmp_path / "stopped")
    with pytest.raises(Interrupted):
        train(config, InterruptAt(4, signal.SIGTERM))
    run = resume(config.out_dir)
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)


def test_a_run_with_a_share_of_it_cannot_be_made_longer(tiny_config: MakeConfig) -> None:
    config = tiny_config(schedule="constant", average_share=0.5)
    train(config)
    with pytest.raises(UserError, match=r"moves .*average_share.*start a new run"):
        resume(config.out_dir, dataclasses.replace(config, max_iters=12))


def test_an_average_that_a_checkpoint_lacks_is_one_clear_line(tiny_config: MakeConfig) -> None:
    run = train(tiny_config(max_iters=3))
    file = run.folder / "config.json"
    text = file.read_text().replace('"average_share": 0.0', '"average_share": 0.5')
    assert text != file.read_text()
    file.write_text(text)
    with pytest.raises(UserError, match=r"average_share .* has been altered"):
        resume(run.folder)


def test_the_average_is_what_a_run_is_judged_by(tiny_config: MakeConfig) -> None:
    run = train(tiny_config(average_share=0.5, schedule="constant"))
    own = train(tiny_config(schedule="constant", out_dir=run.folder.parent / "own"))
    run_summary, own_summary = run.read_summary(), own.read_summary()
    assert run_summary is not None and own_summary is not None
    judged = found(run).validation.loss
    assert evaluate_run(run.folder, device="cpu").loss == pytest.approx(judged, rel=1e-6)
    assert judged != found(own).validation.loss
    rows = zip(metrics(run), metrics(own), strict=True)
    trained = [(a["loss"], b["loss"]) for a, b in rows if a["kind"] == "iteration"]
    assert len(trained) == 9 and all(a == b for a, b in trained)  # training does not see it


def test_a_stop_between_an_evaluation_and_its_step_changes_nothing(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    class StopAtBest(Observer):
        def line(self, text: str) -> None:
            if text.startswith("Saved new best"):
                signal.raise_signal(signal.SIGTERM)

    whole = train(tiny_config(out_dir=tmp_path / "whole"))
    config = tiny_config(out_dir=tmp_path / "stopped")
    with pytest.raises(Interrupted, match="before iteration 4"):
        train(config, StopAtBest())
    run = resume(config.out_dir)
    assert metrics(run) == metrics(whole)
    assert weights(run) == weights(whole)


def test_an_extended_run_that_is_killed_does_not_read_as_finished(
    tiny_config: MakeConfig,
) -> None:
    config = tiny_config(schedule="constant")
    run = train(config)
    longer = dataclasses.replace(run.read_config(), max_iters=12)

    class StopAtTheEnd(Observer):
        def progress(self, name: str, done: int, total: int) -> None:
            if (name, done) == ("training", 13):
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        resume(run.folder, longer, StopAtTheEnd())
    assert run.read_summary() is None
    assert not (run.folder / "story_losses.npy").exists()
    resumed = resume(run.folder)
    assert found(resumed).iterations == 13


def test_a_run_killed_before_it_had_a_config_can_be_started_again(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(max_iters=0)
    with monkeypatch.context() as patch:
        patch.setattr("storylab.record.folder.current_stage", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert config.out_dir.is_dir()
    assert train(config).read_summary() is not None


def test_two_processes_cannot_write_one_run(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(3, signal.SIGTERM))
    before = (config.out_dir / "metrics.jsonl").read_bytes()
    with exclusive(config.out_dir), pytest.raises(UserError, match="another process"):
        resume(config.out_dir)
    assert (config.out_dir / "metrics.jsonl").read_bytes() == before
    assert resume(config.out_dir).read_summary() is not None


def test_a_float16_run_resumes_with_its_loss_scale(tiny_config: MakeConfig, tmp_path: Path) -> None:
    changes = {"dtype": "float16", "max_iters": 5}
    whole = train(tiny_config(out_dir=tmp_path / "whole", **changes))
    config = tiny_config(out_dir=tmp_path / "stopped", **changes)
    with pytest.raises(Interrupted):
        train(config, InterruptAt(3, signal.SIGTERM))
    _, state = checkpoint.load(open_run(config.out_dir).checkpoint("last"))
    assert state["scaler"]["scale"] > 1
    assert weights(resume(config.out_dir)) == weights(whole)


@pytest.mark.parametrize(("block", "unseen"), [(500, 411), (16, 7)])
def test_a_run_tells_of_tokens_that_are_never_trained_on(
    tiny_config: MakeConfig, dataset: Dataset, block: int, unseen: int
) -> None:
    tokens = dataset.manifest["splits"]["train"]["tokens"]
    assert (tokens - 1) % block == unseen
    run = train(tiny_config(block_size=block, max_iters=1, batch_size=1))
    assert found(run).unseen_tokens == unseen
    told = f"the last {unseen} of {tokens:,} training tokens ({unseen / tokens:.1%}) are never"
    assert (told in (run.folder / "log.txt").read_text()) == (unseen / tokens > 0.001)


def test_one_validation_story_has_no_standard_error(
    tmp_path: Path, tiny_config: MakeConfig
) -> None:
    text = builtin.story(0, 0)
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_text(f"{name}. {text}", encoding="utf-8")
    data = storylab.prepare(
        PrepareConfig(
            train=(tmp_path / "train.txt",),
            validation=(tmp_path / "validation.txt",),
            out=tmp_path / "data",
        )
    )
    run = train(tiny_config(data_dir=data.folder, max_iters=1, model=TINY))
    assert run.read_summary() is not None
    assert found(run).validation.standard_error is None
    assert "+/- unknown" in (run.folder / "log.txt").read_text()


@pytest.mark.slow
def test_twenty_kills_leave_the_same_bits(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """SIGKILL at random moments, start-up and the writing of checkpoints among them."""
    changes = {"max_iters": 600, "eval_interval": 100, "checkpoint_minutes": 0.0}
    whole = train(tiny_config(out_dir=tmp_path / "whole", **changes))
    config = tiny_config(out_dir=tmp_path / "killed", **changes)
    script = (
        "import sys, torch; torch.set_num_threads(1); from pathlib import Path\n"
        "from storylab.training.resume import resume; resume(Path(sys.argv[1]))"
    )
    with pytest.raises(Interrupted):
        train(config, InterruptAt(1, signal.SIGTERM))
    rng = random.Random(0)
    kills, reached = 0, []
    while kills < 20:
        before = len(open_run(config.out_dir).read_rows())
        process = subprocess.Popen([sys.executable, "-c", script, str(config.out_dir)])
        # Wait for work to go on, so that most kills hit training and not the import of torch.
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and kills % 4:
            if len(open_run(config.out_dir).read_rows()) > before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.12))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed 20 times"
        kills += 1
        reached.append(checkpoint.load(open_run(config.out_dir).checkpoint("last"))[1])
    iterations = [state["next_iteration"] for state in reached]
    assert iterations == sorted(iterations) and len(set(iterations)) > 5
    run = resume(config.out_dir)
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)


def test_resuming_needs_the_same_config_and_data(
    tiny_config: MakeConfig, tmp_path: Path, dataset: Dataset
) -> None:
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(6, signal.SIGTERM))
    before = {p: p.read_bytes() for p in config.out_dir.rglob("*") if p.is_file()}
    other = dataclasses.replace(config, beta1=0.5)
    with pytest.raises(UserError, match=r"beta1 0\.9 -> 0\.5"):
        resume(config.out_dir, other)
    elsewhere = storylab.prepare(
        PrepareConfig(
            source="builtin", tokenizer="bpe:300", out=tmp_path / "d", builtin_stories=301
        )
    )
    moved = dataclasses.replace(config, data_dir=elsewhere.folder)
    with pytest.raises(UserError, match="fingerprint"):
        resume(config.out_dir, moved)
    longer = dataclasses.replace(config, max_iters=16)
    with pytest.raises(UserError, match="cosine"):
        resume(config.out_dir, longer)  # past the warm-up a cosine depends on its end
    assert {p: p.read_bytes() for p in config.out_dir.rglob("*") if p.is_file()} == before


def test_a_run_goes_on_on_its_own_kind_of_device(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(6, signal.SIGTERM))
    path = config.out_dir / "config.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    before = {p: p.read_bytes() for p in config.out_dir.rglob("*") if p.is_file()}
    for wanted in (None, config, dataclasses.replace(config, device="auto")):
        with pytest.raises(
            UserError, match=r"trained on device 'cuda'.*own kind of device"
        ) as caught:
            resume(config.out_dir, wanted)
        assert "storylab eval" in str(caught.value) and "--device" not in str(caught.value)
    assert {p: p.read_bytes() for p in config.out_dir.rglob("*") if p.is_file()} == before
    assert load_story_model(open_run(config.out_dir), device="cpu").sample("a", max_new_tokens=2)


def test_another_story_may_come_before_the_prompt(tiny_config: MakeConfig) -> None:
    writer = load_story_model(train(tiny_config(max_iters=0)), device="cpu")
    seen: list[list[int]] = []

    def generated(model: Any, prompt: torch.Tensor, *rest: Any) -> Iterator[torch.Tensor]:
        seen.append(prompt[0].tolist())
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storylab.training.sampling.generate", generated)
        writer.sample("<|endoftext|>One.<|endoftext|>Two ")
    end, encode = writer.tokenizer.end_of_text, writer.tokenizer.encode
    assert seen == [[end, *encode("One."), end, *encode("Two")]]


@pytest.mark.parametrize("schedule", ["warm-up", "constant"])
def test_a_run_can_be_extended_where_its_schedule_permits(
    tiny_config: MakeConfig, tmp_path: Path, schedule: str
) -> None:
    how = {"warmup_iters": 50} if schedule == "warm-up" else {"schedule": "constant"}
    short, long = (tiny_config(out_dir=tmp_path / str(n), max_iters=n, **how) for n in (8, 16))
    run = train(short)
    told: list[str] = []

    class Listener(Observer):
        def line(self, text: str) -> None:
            told.append(text)

    assert resume(short.out_dir, None, Listener()).folder == run.folder
    assert "finished" in told[-1]
    extended = resume(
        short.out_dir, dataclasses.replace(run.read_config(), max_iters=16), Listener()
    )
    assert any("8 -> 16" in text for text in told)
    assert weights(extended) == weights(train(long))
    assert extended.read_config().max_iters == 16


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_a_damaged_checkpoint_is_refused(tiny_config: MakeConfig, how: str) -> None:
    run = train(tiny_config())
    path = run.checkpoint("best")
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[-5] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match="best"):
        load_story_model(run, "best")
    assert load_story_model(run, "last").block_size == 16


def test_an_altered_progress_in_a_checkpoint_is_refused(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(6, signal.SIGTERM))
    path = open_run(config.out_dir).checkpoint("last")
    data = path.read_bytes()
    changed = data.replace(b'\\"next_iteration\\": 6', b'\\"next_iteration\\": 5')
    assert changed != data
    path.write_bytes(changed)
    with pytest.raises(UserError, match="altered"):
        resume(config.out_dir)


@pytest.mark.parametrize("file", ["metrics.jsonl", "checkpoints/last.safetensors"])
def test_a_run_that_has_lost_a_file_is_not_begun_again(tiny_config: MakeConfig, file: str) -> None:
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, InterruptAt(6, signal.SIGTERM))
    (config.out_dir / file).unlink()
    with pytest.raises(UserError, match=file.split("/")[-1]):
        resume(config.out_dir)


def test_weights_that_do_not_fit_the_config_are_refused(tiny_config: MakeConfig) -> None:
    run = train(tiny_config(max_iters=0))
    path = run.folder / "config.json"
    path.write_text(path.read_text().replace('"n_hidden": 48', '"n_hidden": 50'))
    with pytest.raises(UserError, match=r"config\.json"):
        load_story_model(run)


def test_a_stream_leaves_the_caller_its_own_modes(tiny_config: MakeConfig) -> None:
    model = load_story_model(train(tiny_config(max_iters=0, dtype="bfloat16")), device="cpu")
    for _ in zip(model.stream("a", max_new_tokens=3), model.stream("b"), strict=False):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_a_checkpoint_holds_no_pickle_and_reads_elsewhere(tiny_config: MakeConfig) -> None:
    from safetensors.numpy import load_file

    run = train(tiny_config())
    plain = load_file(run.checkpoint("best"))
    model = Transformer(TINY, VOCAB)
    assert {n: v.shape for n, v in plain.items()} == {
        n: tuple(v.shape) for n, v in model.state_dict().items()
    }


def test_a_folder_with_something_in_it_is_not_written_over(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    config.out_dir.mkdir()
    (config.out_dir / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        train(config)
    assert [p.name for p in config.out_dir.iterdir()] == ["notes.txt"]


def test_a_window_longer_than_a_split_is_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="block_size"):
        train(tiny_config(block_size=100_000))


def test_evaluating_a_run_again_gives_its_summary(tiny_config: MakeConfig) -> None:
    run = train(tiny_config())
    assert run.read_summary() is not None
    again = evaluate_run(run.folder, device="cpu")
    assert again.loss == found(run).validation.loss
    other = evaluate_run(run.folder, device="cpu", block_size=7, aligned=True)
    assert len(other.position_losses) == 7
    with pytest.raises(UserError, match="block_size"):
        evaluate_run(run.folder, device="cpu", block_size=0)
    train_split = evaluate_run(run.folder, split="train", device="cpu")
    assert len(train_split.story_losses) == 285


def test_the_public_api(tiny_config: MakeConfig, capsys: Any) -> None:
    run = storylab.train(tiny_config())
    assert storylab.load_run(run.folder).config == run.config
    model = storylab.load_model(run.folder, device="cpu")
    first = model.sample("Once upon", max_new_tokens=20, count=3)
    assert first == model.sample("Once upon", max_new_tokens=20, count=3)
    assert len(first) == 3 and all(text.startswith("Once upon") for text in first)
    assert model.sample("", max_new_tokens=5)
    with pytest.raises(UserError, match="not a run folder"):
        storylab.load_run("nowhere")
    assert capsys.readouterr() == ("", "")


def test_sampling_stops_at_the_end_of_text(tiny_config: MakeConfig) -> None:
    model = load_story_model(train(tiny_config(max_iters=0)), device="cpu")
    rows = iter(
        [[5, 7], [model.tokenizer.end_of_text, 9], [6, model.tokenizer.end_of_text], [1, 1]]
    )
    columns = (torch.tensor(row) for row in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storylab.training.sampling.generate", lambda *a, **k: columns)
        stories = model.sample("", count=2)
    assert stories == [model.tokenizer.decode([5]), model.tokenizer.decode([7, 9])]


@pytest.mark.slow
def test_compiled_blocks_train_like_eager_ones(tiny_config: MakeConfig, tmp_path: Path) -> None:
    if missing_for_compiling("cpu") is not None:
        pytest.skip("nothing here compiles C++")
    script = (
        "import sys, json, torch; from storylab.config import from_dict\n"
        "from storylab.training.train import train\n"
        "train(from_dict(json.loads(sys.argv[1])))"
    )
    eager, compiled = (
        tiny_config(out_dir=tmp_path / str(c), compile=c, max_iters=3) for c in (False, True)
    )
    train(eager)
    arguments = json.dumps(storylab.config.to_dict(compiled))
    subprocess.run([sys.executable, "-c", script, arguments], check=True, capture_output=True)
    a, b = open_run(eager.out_dir), open_run(compiled.out_dir)
    losses = [
        [row.loss for row in run.read_rows() if isinstance(row, IterationRow)] for run in (a, b)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    names = [set(checkpoint.load(run.checkpoint("last"))[0]) for run in (a, b)]
    assert names[0] == names[1]


class FakeNvml:
    """NVML's calls as its documentation has them: milliwatts, millijoules, percent."""

    class NVMLError(Exception):
        pass

    def __init__(self, has_energy: bool) -> None:
        self.has_energy, self.millijoules, self.open = has_energy, 5_000_000, False

    def nvmlInit(self) -> None:  # noqa: N802 - named by the library, as are those below
        self.open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open = False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert uuid == "GPU-1234-abcd"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if not self.has_energy:
            raise self.NVMLError
        self.millijoules += 1000
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return 300_000

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=80, memory=10)


@pytest.mark.parametrize("has_energy", [True, False])
def test_power_and_energy_come_from_nvml(monkeypatch: pytest.MonkeyPatch, has_energy: bool) -> None:
    nvml = FakeNvml(has_energy)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    properties = SimpleNamespace(uuid="1234-abcd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("storylab.training.telemetry.SAMPLE_SECONDS", 0.001)
    before = PowerTotals(samples=1, watts=100.0, percent=40.0, energy_joules=7.0)
    with Telemetry(torch.device("cuda"), before) as telemetry:
        deadline = time.monotonic() + 30
        while not telemetry.samples and time.monotonic() < deadline:
            time.sleep(0.01)
        assert telemetry.latest()["power_watts"] == 300
        # Seven joules before the resume; the counter, read at the start, in latest() and here, has
        # gone up by two since.
        assert telemetry.totals().energy_joules == pytest.approx(9.0 if has_energy else 7.0)
        sums = telemetry.totals()
    assert sums.watts == 100 + 300 * (sums.samples - 1)
    assert not nvml.open


def test_nothing_is_known_of_a_cpu_s_power() -> None:
    with Telemetry(CPU, PowerTotals()) as telemetry:
        assert set(telemetry.latest().values()) | set(telemetry.means().values()) == {None}


def test_the_code_version_is_that_of_what_python_runs() -> None:
    source = '''"""A module."""

# A remark.
X = "# no comment"  # a comment


class Thing:
    """A thing, über alles."""

    size: int = 3
    """Its size."""

    def grow(self) -> str:
        """Docstring
        of two lines.
        """
        return """no docstring"""
'''
    bare = bare_source(source)
    assert bare == (
        'X = "# no comment"\nclass Thing:\n    size: int = 3\n    def grow(self) -> str:\n'
        '        return """no docstring"""'
    )
    other = (
        source.replace("A remark", "Another").replace("Its size", "How large").replace("\n\n", "\n")
    )
    assert bare_source(other) == bare
    assert bare_source(source.replace("= 3", "= 4")) != bare


def test_what_only_tells_of_a_run_is_there() -> None:
    """A file that was renamed would count as numeric code again, without a word."""
    root = Path(storylab.__file__).parent
    assert all((root / name).is_file() for name in NON_NUMERIC_MODULES)


def test_the_last_checkpoint_is_written_once(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, at both evaluations, and not again at the end, where nothing has changed since."""
    saved: list[tuple[str, int]] = []
    save = checkpoint.save

    def counted(path: Path, tensors: Any, state: dict[str, Any]) -> None:
        if path.stem == "last":
            saved.append((path.stem, state["next_iteration"]))
        save(path, tensors, state)

    monkeypatch.setattr(checkpoint, "save", counted)
    train(tiny_config(max_iters=8, eval_interval=4))
    assert saved == [("last", 0), ("last", 5), ("last", 9)]
