"""A training step against plain gradients, in every wide precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from finished_runs import CPU
from stepping import VOCAB, batch, new, step
from storylab.training.precision import (
    choose_precision,
)
from storylab.training.step import NonFiniteError, training_step


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
