"""Optimizers skip a step that is not finite, on the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stepping import new
from storylab.optim import OPTIMIZERS
from storylab.optim.build import require_skipping, skip_where


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_step_that_is_not_finite_changes_nothing_on_the_device(optimizer: str) -> None:
    """CUDA relies on this, shown on the CPU: the skip is part of the update."""
    model, optimizers = new(optimizer=optimizer, weight_decay=0.3)

    def update(value: float, skip: bool) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        skip_where(optimizers, torch.tensor(skip))
        for each in optimizers:
            each.step()

    def state() -> list[torch.Tensor]:
        kept = [t for o in optimizers for s in o.state.values() for t in s.values()]
        return [t.clone() for t in (*model.parameters(), *kept)]

    update(0.1, False)
    before = state()
    update(float("nan"), True)
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    update(0.1, False)
    assert not any(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def after_a_bad_step(optimizer: torch.optim.Optimizer) -> list[float]:
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.full_like(weight, float("nan"))
    skip_where([optimizer], torch.tensor(True))
    optimizer.step()
    return weight.tolist()


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RMSprop])
def test_an_optimizer_that_ignores_the_skip_is_refused(kind: Any) -> None:
    """It would write NaN on a card."""
    optimizer = kind([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match=f"{kind.__name__} does not heed found_inf"):
        require_skipping(optimizer)
    assert all(math.isnan(x) for x in after_a_bad_step(optimizer))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_that_heeds_the_skip_is_taken(kind: Any) -> None:
    optimizer = kind([torch.nn.Parameter(torch.ones(3))], lr=0.1, fused=True)
    require_skipping(optimizer)
    assert after_a_bad_step(optimizer) == [1.0] * 3
