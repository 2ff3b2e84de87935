"""Lines of a run, as the original log has them."""

from __future__ import annotations

import dataclasses

import pytest

from storylab.config import (
    ModelConfig,
)
from storylab.training import log_format
from storylab.training.log_format import attention_lines


def test_the_windows_in_effect_are_printed() -> None:
    config = dataclasses.replace(ModelConfig(), n_layer=2, attention="window:64,full")
    assert (
        attention_lines(config, 32)[0] == "layer  1: window of 64, reads up to 32 of 32 positions"
    )
    assert "receptive field of an output: 127 of 128" in "".join(
        attention_lines(dataclasses.replace(config, attention="window:64"), 128)
    )
    assert attention_lines(ModelConfig(), 128) == []
    windows = dataclasses.replace(config, attention="window:64,full")
    idle = "on a GPU these windows save no time at 128 tokens"
    for block_size, cuda, said in ((128, True, True), (128, False, False), (256, True, False)):
        lines = attention_lines(windows, block_size, cuda)
        assert any(line.startswith(idle) for line in lines) == said


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
