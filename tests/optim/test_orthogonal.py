"""Muon and its variants against torch's own and against singular values."""

from __future__ import annotations

import math

import pytest
import torch

from samples import TINY
from stepping import FLOAT32, VOCAB, batch, new, step
from storylab.config import TrainConfig
from storylab.model.transformer import Transformer
from storylab.optim import OPTIMIZERS
from storylab.optim.orthogonal import Muon, orthogonalize
from storylab.training.state import TrainState


def test_muon_is_that_of_torch_for_each_projection() -> None:
    """Three steps against torch.optim.Muon, given the joined matrices in their parts."""
    model, optimizers = new(optimizer="muon", muon_lr=0.05, weight_decay=0.3)
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


def test_normuon_is_muon_with_rows_of_equal_norm() -> None:
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
            scaled = update / mean.sqrt()
            expected.append(scaled * update.norm() / scaled.norm())
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
