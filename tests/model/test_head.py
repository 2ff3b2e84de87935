"""The loss in chunks against plain cross-entropy."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from storylab.compiler import missing_for_compiling
from storylab.model import head
from storylab.model.head import ChunkSizes, linear_cross_entropy, token_losses


@pytest.mark.parametrize("count", [1, 15, 19])
@pytest.mark.parametrize(
    "cut", [ChunkSizes(16, 10, 1), ChunkSizes(16, 2**31, 8)], ids=["cpu", "cuda"]
)
def test_head_loss_and_gradients_equal_plain_cross_entropy(
    count: int, cut: ChunkSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a vocabulary that is padded, as on a GPU."""
    # Small chunks, so that few tokens fill several; those of a GPU can be had on no CPU otherwise.
    monkeypatch.setattr(head, "chunk_sizes", lambda device: cut)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 8, generator=generator, dtype=torch.float64).float()
    weight = torch.randn(31, 8, generator=generator)
    targets = torch.randint(31, (count,), generator=generator)
    a = [t.clone().requires_grad_() for t in (hidden, weight)]
    b = [t.double().requires_grad_() for t in (hidden, weight)]
    ours = linear_cross_entropy(*a, targets)
    logits = b[0] @ b[1].T
    plain = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(ours.double(), plain, rtol=1e-6, atol=1e-6)
    (ours * 0.3).backward()
    (plain * 0.3).backward()
    for mine, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    each = F.cross_entropy(logits.detach(), targets, reduction="none")
    ours_each = token_losses(hidden, weight, targets).double()
    torch.testing.assert_close(ours_each, each, rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_word_held_for_impossible_is_finite() -> None:
    """Its probability is 0 in float32, its logarithm is not."""
    hidden = torch.tensor([[500.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([2]))
    loss.backward()
    assert loss.item() == 1000.0 and hidden.grad is not None and hidden.grad.item() == 2.0


def test_head_under_autocast_stays_near_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 64, generator=generator)
    weight = (torch.randn(1000, 64, generator=generator) * 0.1).requires_grad_()
    targets = torch.randint(1000, (600,), generator=generator)
    exact = linear_cross_entropy(hidden, weight, targets) / 600
    (expected,) = torch.autograd.grad(exact, weight)
    with torch.autocast("cpu", torch.bfloat16):
        low = linear_cross_entropy(hidden, weight, targets) / 600
    (grad,) = torch.autograd.grad(low, weight)
    assert abs((low - exact).item()) < 2e-3
    assert float((grad - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.slow
@pytest.mark.skipif(missing_for_compiling("cpu") is not None, reason="nothing here compiles C++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_softmax_in_one_kernel_is_the_softmax(dtype: torch.dtype) -> None:
    """A GPU's, here by the CPU's compiler: against float64, in rows that are a part of padded ones."""
    generator = torch.Generator().manual_seed(0)
    padded = (4 * torch.randn(40, 320, generator=generator)).to(dtype)
    logits, targets = padded.narrow(1, 0, 300), torch.randint(300, (40,), generator=generator)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The public loss uses this kernel on GPUs only; it gives the same on a CPU.
        losses = head._losses_in_one_kernel(logits, targets, gradient=True)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 5e-3, "atol": 1e-6}
    torch.testing.assert_close(logits.double(), gradient, **close)
