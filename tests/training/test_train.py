"""A run from start to end: its folder, its bits, its seeds."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import storylab
from finished_runs import found, metrics, weights
from samples import TINY, MakeConfig
from stepping import FLOAT32, VOCAB
from storylab.data import builtin
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.model.transformer import Transformer
from storylab.record import checkpoint
from storylab.record.schema import EvaluationRow, IterationRow
from storylab.training.evaluation import evaluate_run
from storylab.training.setup import TrainingSetup
from storylab.training.train import train


@pytest.mark.slow
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


@pytest.mark.slow
def test_best_is_the_lowest_validation_loss_not_the_latest(tiny_config: MakeConfig) -> None:
    # A rate this high makes the loss go up and down.
    run = train(tiny_config(max_iters=20, eval_interval=2, learning_rate=3.0, schedule="constant"))
    losses = {r.iteration: r.val_loss for r in run.read_rows() if isinstance(r, EvaluationRow)}
    best = min(losses, key=lambda i: losses[i])
    _, state = checkpoint.load(run.checkpoint("best"))
    assert best != 20, "this test needs a run whose last loss is not its best"
    assert state == {"iteration": best, "val_loss": losses[best]}
    assert found(run).best_iteration == best


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_average_is_what_a_run_is_judged_by(tiny_config: MakeConfig) -> None:
    run = train(tiny_config(ema_fraction=0.5, schedule="constant"))
    own = train(tiny_config(schedule="constant", out_dir=run.folder.parent / "own"))
    run_summary, own_summary = run.read_summary(), own.read_summary()
    assert run_summary is not None and own_summary is not None
    judged = found(run).validation.loss
    assert evaluate_run(run.folder, device="cpu").loss == pytest.approx(judged, rel=1e-6)
    assert judged != found(own).validation.loss
    rows = zip(metrics(run), metrics(own), strict=True)
    trained = [(a["loss"], b["loss"]) for a, b in rows if a["kind"] == "iteration"]
    assert len(trained) == 9 and all(a == b for a, b in trained)  # training does not see it


@pytest.mark.slow
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
