"""Optimizers, schedules and the average of the weights, each against something independent."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conftest import TINY
from stepping import FLOAT32, VOCAB, batch, new, step
from storylab.config import TrainConfig
from storylab.model.transformer import Transformer
from storylab.optim import OPTIMIZERS, schedule
from storylab.optim.build import require_skipping, skip_where
from storylab.optim.orthogonal import Muon, orthogonalize
from storylab.optim.schedule import SCHEDULES, Schedule, learning_rate, telling_iterations
from storylab.training.state import TrainState

# --- every optimizer


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_step_that_is_not_finite_changes_nothing_on_the_device(optimizer: str) -> None:
    """What CUDA relies on, on the CPU: the skip is part of the update."""
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


# --- single ones


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


def test_muon_is_that_of_torch_for_each_projection() -> None:
    """Three steps against torch.optim.Muon, given the joined matrices in their parts."""
    model, optimizers = new(optimizer="muon", matrix_lr=0.05, weight_decay=0.3)
    reference = Transformer(TINY, VOCAB, seed=0)
    parts = {
        name: [torch.nn.Parameter(part.clone()) for part in p.detach().split(rows)]
        for name, p in reference.named_parameters()
        for matrix, rows in reference.block_matrices()
        if matrix is p
    }
    theirs = torch.optim.Muon(
        [p for group in parts.values() for p in group], lr=0.05, weight_decay=0.3
    )
    for _ in range(3):
        step(model, optimizers, grad_clip=0.0)
        for name, p in model.named_parameters():
            if name in parts:
                assert p.grad is not None
                rows = [len(part) for part in parts[name]]
                for part, grad in zip(parts[name], p.grad.split(rows), strict=True):
                    part.grad = grad.clone()
        theirs.param_groups[0]["lr"] = 1e-2 * 0.05 / 1e-4  # as the step's learning rate is
        theirs.step()
    for name, p in model.named_parameters():
        if name in parts:
            torch.testing.assert_close(p, torch.cat(parts[name]), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 40, 12), (2, 12, 40)])
def test_orthogonalized_matrices_have_singular_values_near_one(
    shape: tuple[int, int, int],
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result.double())
    assert values.min() > 0.5 and values.max() < 1.35
    u, _, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(result.flatten(1), (u @ v).float().flatten(1))
    assert cosine.min() > 0.95


def test_normuon_is_muon_with_rows_alike() -> None:
    """Four updates, from gradients whose rows change in size, against Li et al. 2025, algorithm 1, in
    float64 for everything after the orthogonalization, with the norm of Muon's update."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(9, 6))
    optimizer = Muon([(weight, (6, 3))], 1.0, 0.0, normalize_rows=True)
    momentum = torch.zeros_like(weight)
    squares = torch.zeros(9, 1, dtype=torch.float64)
    for _ in range(4):
        sizes = torch.rand(9, 1, generator=generator) ** 4
        weight.grad = sizes * torch.randn(weight.shape, generator=generator)
        before = weight.detach().clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * weight.grad
        ahead = 0.95 * momentum + 0.05 * weight.grad
        expected = []
        for part, mean in zip(ahead.split((6, 3)), squares.split((6, 3)), strict=True):
            update = orthogonalize(part.unsqueeze(0))[0].double()
            mean.mul_(0.95).add_(0.05 * update.square().mean(1, keepdim=True))
            alike = update / mean.sqrt()
            expected.append(alike * update.norm() / alike.norm())
        kept = optimizer.state[weight]["row_squares"].double()
        torch.testing.assert_close(kept, squares, rtol=0.01, atol=0)
        change = (before - weight.detach()).double()
        torch.testing.assert_close(change, torch.cat(expected), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_matrix_whose_first_gradient_is_zero_is_trained(optimizer: str) -> None:
    """As most matrices' is where those that write to the residual stream begin at zero."""
    config = TrainConfig(model=TINY, optimizer=optimizer, batch_size=8, weight_decay=0.0)  # type: ignore[arg-type]
    trained = TrainState(config, VOCAB, FLOAT32)
    for block in trained.model.blocks:
        block.attention.out.weight.data.zero_()
        block.feed_forward.down.weight.data.zero_()
    weight = trained.model.blocks[0].feed_forward.gate_up.weight
    begun = weight.detach().clone()
    losses = [trained.step(i, batch(), learning_rate=1e-3).read().loss for i in range(3)]
    assert all(math.isfinite(loss) for loss in losses) and losses[2] < losses[0]
    assert not torch.equal(weight, begun)


def test_averaged_weights_are_a_running_mean_that_forgets() -> None:
    """Plain mean of the first weights, exponential from as many as the share holds, in float64."""
    config = TrainConfig(model=TINY, max_iters=9, average_share=0.4, batch_size=8)
    trained = TrainState(config, VOCAB, FLOAT32)
    weight = trained.model.embedding.weight
    expected = torch.zeros_like(weight, dtype=torch.float64)
    for number in range(1, 11):
        trained.step(number - 1, batch(), learning_rate=1e-2)
        newest = 1 / min(number, 4)
        expected = (1 - newest) * expected + newest * weight.detach().double()
        own = weight.detach().clone()
        with trained.averaged():
            torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(weight, own)


# --- schedules


def test_a_schedule_may_bend_by_a_field_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant, then down in a line (Hu et al. 2024, arXiv 2404.06395): two courses that differ only behind
    their bends are told apart by few iterations."""

    def left(progress: float, config: TrainConfig) -> float:
        stable = 1 - config.average_share  # stands for the field
        return 1.0 if progress <= stable else (1 - progress) / (1 - stable)

    bending = Schedule(left, bends=lambda config: (1 - config.average_share,))
    monkeypatch.setitem(schedule.SCHEDULES, "constant", bending)
    a = TrainConfig(
        schedule="constant", warmup_iters=10, max_iters=100_010, average_share=0.001, min_lr=0.0
    )
    b = dataclasses.replace(a, average_share=0.0011)
    assert learning_rate(a, 99_910) == learning_rate(b, 50) == a.learning_rate
    assert learning_rate(a, 99_960) == pytest.approx(a.learning_rate / 2)
    told = telling_iterations((a, b), a.iterations)
    assert len(told) < 200
    assert any(learning_rate(a, i) != learning_rate(b, i) for i in told)


def test_a_constant_schedule_never_reads_its_end() -> None:
    assert [name for name, s in SCHEDULES.items() if not s.decays] == ["constant"]
    for peak, end in ((1e-4, 5e-5), (0.01, 0.001), (0.003, 0.0001)):
        config = TrainConfig(
            schedule="constant", warmup_iters=2, max_iters=9, learning_rate=peak, min_lr=end
        )
        assert {learning_rate(config, i) for i in range(2, 10)} == {peak}
