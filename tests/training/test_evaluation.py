"""Losses of stories against a plain loop, and their standard error against the jackknife."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import storylab
from finished_runs import found, weights
from samples import TINY, MakeConfig
from stepping import FLOAT32, VOCAB
from storylab.data import builtin
from storylab.data.dataset import Dataset
from storylab.data.prepare import PrepareConfig
from storylab.errors import UserError
from storylab.model.transformer import Transformer
from storylab.training.evaluation import Evaluation, estimate_loss, evaluate_run, evaluate_split
from storylab.training.train import train


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
        # No flag sets the size, which changes nothing but speed.
        monkeypatch.setattr("storylab.training.evaluation.EVAL_BATCH", size)
        losses.append(evaluate_split(model, split, 16, FLOAT32).loss)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


@pytest.mark.slow
def test_evaluation_does_not_touch_the_training_order(tiny_config: MakeConfig) -> None:
    often, seldom = (
        train(tiny_config(out_dir=tiny_config().out_dir / str(n), eval_interval=n)) for n in (1, 8)
    )
    assert weights(often) == weights(seldom)


def test_the_estimate_is_the_mean_over_the_fixed_windows(dataset: Dataset) -> None:
    model, split = Transformer(TINY, VOCAB, seed=4), dataset.splits["train"]
    count = (len(split) - 1) // 16
    whole = evaluate_split(model, split, 16, FLOAT32).loss
    # More windows than there are: all of them, so the two must agree except for the tail.
    assert estimate_loss(model, split, 16, count, FLOAT32) == pytest.approx(whole, rel=1e-3)


@pytest.mark.slow
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
