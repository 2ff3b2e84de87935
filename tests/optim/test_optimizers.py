"""Optimizers and their entries: a step in float64, their state, their costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from samples import TINY
from stepping import VOCAB, batch, new, step
from storylab.model.transformer import Transformer
from storylab.optim import OPTIMIZERS


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_state_of_an_optimizer_is_what_its_entry_says(name: str) -> None:
    """By name, as a checkpoint has it, and each number counted (the plan's memory)."""
    model, optimizers = new(optimizer=name)
    step(model, optimizers)
    entry, optimizer = OPTIMIZERS[name], optimizers[0]
    for parameter, state in optimizer.state.items():
        assert state.keys() == entry.state_names
        if parameter.dim() == 2:
            numbers = sum(t.numel() for t in state.values() if t.dim())
            cost = entry.cost
            assert numbers == cost.state * parameter.numel() + cost.row_state * len(parameter)
    updated = {p for o in optimizers for p in o.state}
    assert updated == set(model.parameters())
    assert entry.matrices_only == (len(optimizers) == 2)


def test_names_and_costs_need_no_torch() -> None:
    script = (
        "import sys; from storylab.config import TrainConfig; from storylab.optim import OPTIMIZERS;"
        "from storylab.optim.schedule import learning_rate; learning_rate(TrainConfig(), 3);"
        "assert OPTIMIZERS['muon'].cost.product_flops(2, 3) > 0; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_step_is_adamw_in_float64() -> None:
    """Two steps against Loshchilov & Hutter's algorithm 2 written out, gradients from plain loss."""
    model, optimizers = new(beta1=0.8, beta2=0.9, weight_decay=0.3)
    reference = Transformer(TINY, VOCAB, seed=0).double()
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in
               reference.named_parameters()}  # fmt: skip
    for t in (1, 2):
        step(model, optimizers, grad_clip=0.0)
        logits = reference(batch()[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch()[:, 1:].flatten())
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                assert p.grad is not None
                m, v = moments[name]
                m.mul_(0.8).add_(0.2 * p.grad)
                v.mul_(0.9).add_(0.1 * p.grad**2)
                update = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
                decay = 0.3 if p.dim() == 2 else 0.0  # norm gains are not decayed
                p.sub_(1e-2 * (update + decay * p))
    expected = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-3, atol=2e-5)
