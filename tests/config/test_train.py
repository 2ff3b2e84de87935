"""Values of a config without sense are refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from storylab.config import (
    Dtype,
    ModelConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from storylab.errors import UserError
from storylab.training.setup import resolve


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"grad_clip": float("inf")},
        {"beta1": 1.0},
        {"max_iters": -1},
        {"log_interval": 0},
        {"max_iters": 10**16},
        {"learning_rate": 1e39},
        {"muon_lr": 1e308},
    ],
)
def test_values_without_sense_are_refused_by_name(changes: dict[str, float]) -> None:
    (name,) = changes
    with pytest.raises(UserError, match=name):
        TrainConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_narrow_stream_needs_products_that_keep_it_narrow(dtype: Dtype) -> None:
    narrow = ModelConfig(residual_dtype="bfloat16")
    with pytest.raises(UserError, match=f"residual_dtype bfloat16 does not go with dtype {dtype}"):
        TrainConfig(model=narrow, dtype=dtype)
    assert TrainConfig(model=narrow, dtype="nvfp4").model.residual_dtype == "bfloat16"


def test_a_rate_that_would_rise_after_its_warm_up_is_refused() -> None:
    rising = TrainConfig(max_iters=2000, learning_rate=2e-5)
    with pytest.raises(UserError, match="min_lr 5e-05 is above learning_rate 2e-05"):
        rising.require_no_rise()
    with pytest.raises(UserError, match="min_lr 5e-05 is above learning_rate 2e-05"):
        resolve(rising)
    # Where min_lr is never read it is of no matter.
    TrainConfig(learning_rate=2e-5).require_no_rise()
    dataclasses.replace(rising, schedule="constant").require_no_rise()
    # A run from before there was such a check can still be read.
    assert from_dict(to_dict(rising)) == rising
