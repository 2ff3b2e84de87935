"""The record's own numbers: its lines, learning rates, speeds and first loss."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from storylab.config import PRESETS, TrainConfig
from storylab.data.prepare import PrepareConfig, prepare
from storylab.model.transformer import Transformer
from storylab.optim.schedule import learning_rate
from storylab.training import log_format
from storylab.training.evaluation import window_losses
from storylab.training.precision import choose_device, choose_precision

TOKENS = 131_072


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            (0, 10.9652, 6.506, 0, 0.0),
            "iter 0:    loss 10.9652, time 6506.00ms,   0 tok/s,        lr 0.00e+00",
        ),
        (
            (100, 7.541, 112.19647, 100 * TOKENS, 1e-5),
            "iter 100:  loss 7.5410,  time 112196.47ms, 116,824 tok/s,  lr 1.00e-05",
        ),
        (
            (500, 3.184, 118.40963, 100 * TOKENS, 5e-5),
            "iter 500:  loss 3.1840,  time 118409.63ms, 110,694 tok/s,  lr 5.00e-05",
        ),
        (
            (1000, 2.041, 118.45917, 100 * TOKENS, 1e-4),
            "iter 1000: loss 2.0410,  time 118459.17ms, 110,647 tok/s,  lr 1.00e-04",
        ),
    ],
)
def test_iteration_lines(arguments: tuple[int, float, float, int, float], line: str) -> None:
    assert log_format.iteration_line(*arguments) == line


def test_long_fields_keep_a_space_between() -> None:
    line = log_format.iteration_line(1_000_000, 123.4567, 1e7, 10**15, 1e-4)
    assert line.split() == [
        *("iter", "1000000:", "loss", "123.4567,", "time", "10000000000.00ms,"),
        *("100,000,000", "tok/s,", "lr", "1.00e-04"),
    ]


def test_evaluation_lines() -> None:
    expected = "Step 500:  train loss 3.2190, val loss 3.2224"
    assert log_format.evaluation_line(500, 3.219, 3.2224) == expected
    expected = "Step 1000: train loss 2.1456, val loss 2.1477"
    assert log_format.evaluation_line(1000, 2.1456, 2.1477) == expected
    assert log_format.best_line(2.1477) == "Saved new best model (val loss: 2.1477)"


@pytest.mark.parametrize("iteration", [0, 100, 500, 999, 1000])
def test_learning_rates_of_the_record(iteration: int) -> None:
    assert learning_rate(TrainConfig(), iteration) == pytest.approx(iteration * 1e-7, rel=1e-12)


def test_cosine_of_a_longer_run_ends_at_half_the_peak() -> None:
    config = TrainConfig(max_iters=5000)
    assert learning_rate(config, 1000) == pytest.approx(1e-4)
    assert learning_rate(config, 3000) == pytest.approx(7.5e-5)
    assert learning_rate(config, 5000) == pytest.approx(5e-5)
    rates = [learning_rate(config, i) for i in range(1000, 5001)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)


def test_other_schedules() -> None:
    linear = TrainConfig(max_iters=100, warmup_iters=0, schedule="linear", min_lr=0.0)
    assert learning_rate(linear, 0) == 1e-4  # no warm-up starts at the peak
    assert learning_rate(linear, 25) == pytest.approx(0.75e-4)
    constant = TrainConfig(max_iters=100, warmup_iters=10, schedule="constant")
    assert learning_rate(constant, 5) == pytest.approx(0.5e-4)
    assert {learning_rate(constant, i) for i in (10, 50, 100)} == {1e-4}


def test_initial_loss_is_that_of_the_expected_logits() -> None:
    """Logits of a normed state with N(0, 0.02) rows have variance 0.02^2 * width."""
    preset = PRESETS["3m"]
    model = Transformer(preset.model, preset.vocab_size, seed=1)
    tokens = torch.randint(preset.vocab_size, (4, 65), generator=torch.Generator().manual_seed(0))
    expected = math.log(preset.vocab_size) + 0.02**2 * preset.model.n_embd / 2
    assert float(model.token_losses(tokens[:, :-1], tokens[:, 1:]).mean()) == pytest.approx(
        expected, abs=0.03
    )


def test_first_loss_of_the_record_on_real_stories(real_stories: Path, tmp_path: Path) -> None:
    """The record's first line is 10.9652 on 131,072 tokens; a part of a batch is near enough."""
    validation = (real_stories / "v1-validation-00000-of-00001.parquet",)
    data = prepare(PrepareConfig(train=validation, validation=validation, out=tmp_path / "data",
                                 keep_overlap=True))  # fmt: skip
    assert data.splits["train"].stories[-1, 1] == 186_782  # bytes, from the data's own table
    assert len(data.splits["train"]) == 46_664 + 220  # its tokens and an end of text a story
    model = Transformer(PRESETS["113m"].model, data.vocab_size, seed=1337)
    precision = choose_precision(choose_device("cpu"), "bfloat16")
    starts = np.arange(16) * 128
    losses = window_losses(model, data.splits["train"], starts, 128, precision)
    assert 10.90 <= losses.mean() <= 11.05
