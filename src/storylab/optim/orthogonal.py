"""Muon and NorMuon: momentum whose update is orthogonalized (see :mod:`storylab.optim.optimizers.muon`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from storylab.optim.optimizers.muon import NEWTON_SCHULZ_STEPS

# Coefficients of the iterations that bring singular values near 1 (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MUON_MOMENTUM = 0.95
# Decay of the squares that NorMuon keeps of every row (Li et al. 2025).
NORMUON_DECAY = 0.95

Work = Callable[[Tensor], Tensor]
"""Matrices ``[n, rows, columns]`` to as many results of the same shape, each from its own matrix."""
Divide = Callable[[Work, Tensor], Tensor]
"""Does a work on matrices, of which several processes may each do a share."""
Matrices = dict[Tensor, tuple[Tensor, ...]]
"""For each parameter its Nesterov momentum, its weight and, under NorMuon, the squares of its rows."""


def undivided(work: Work, matrices: Tensor) -> Tensor:
    """Do the whole work here."""
    return work(matrices)


class Muon(torch.optim.Optimizer):
    """Momentum whose update has all singular values near 1 (Jordan et al. 2024).

    ``W -= lr * sqrt(max(1, rows / columns)) * orthogonalize(nesterov momentum)``, with decoupled
    weight decay. Matrices of one shape are worked on together.

    Args:
        matrices: each weight ``[rows, columns]`` with the rows of the projections that it joins,
            each of which is updated as a separate matrix.
        lr: learning rate.
        weight_decay: share of lr by which a weight shrinks.
        normalize_rows: divide every row of an update by the root of a running mean of its squares,
            and give the whole the norm that it had (NorMuon, Li et al. 2025, arXiv 2510.05491,
            except for that norm, which gives lr the same meaning with and without).

    Attributes:
        divide: divides the orthogonalization, most of an update's work, between the processes of a run.
        by_matrix: context with the matrices that this process updates in place, the first tensor of each
            being only read. They are whole, also where several processes each hold some rows of a matrix.
    """

    divide: Divide
    by_matrix: Callable[[Matrices], AbstractContextManager[Matrices]]

    skips_where_found_inf = True

    def __init__(
        self,
        matrices: Iterable[tuple[Tensor, Sequence[int]]],
        lr: float,
        weight_decay: float,
        normalize_rows: bool = False,
    ) -> None:
        joined = list(matrices)
        defaults = {"lr": lr, "weight_decay": weight_decay, "normalize_rows": normalize_rows}
        super().__init__([p for p, _ in joined], defaults)
        self.divide = undivided
        self.by_matrix = nullcontext
        self.rows = {p: tuple(rows) for p, rows in joined}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the current gradients."""
        assert closure is None
        skip: Tensor | None = getattr(self, "found_inf", None)
        keep = None if skip is None else skip == 0
        for group in self.param_groups:
            matrices: Matrices = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                    if group["normalize_rows"]:
                        state["row_squares"] = torch.zeros_like(parameter[:, :1])
                _ema_(state["momentum"], parameter.grad, MUON_MOMENTUM, keep)
                nesterov = parameter.grad.lerp(state["momentum"], MUON_MOMENTUM)
                squares = [state["row_squares"]] if group["normalize_rows"] else []
                matrices[parameter] = (nesterov, parameter, *squares)
            with self.by_matrix(matrices) as own:
                for same_shape in self._by_shape(own):
                    _update_same_shape(same_shape, group, keep, self.divide)

    def _by_shape(self, matrices: Matrices) -> Iterable[list[tuple[Tensor, ...]]]:
        """The separate matrices in lists of one shape each."""
        shapes: dict[torch.Size, list[tuple[Tensor, ...]]] = defaultdict(list)
        for parameter, joined in matrices.items():
            for parts in zip(*(t.split(self.rows[parameter]) for t in joined), strict=True):
                shapes[parts[0].shape].append(parts)
        return shapes.values()


def _update_same_shape(
    tensors: Sequence[tuple[Tensor, ...]],
    group: dict[str, Any],
    keep: Tensor | None,
    divide: Divide,
) -> None:
    """Update matrices of one shape together, where ``keep`` (a bool scalar) is not false.

    Args:
        tensors: for each its Nesterov momentum and weight ``[rows, columns]``, and its row squares
            ``[rows, 1]`` where the group normalizes rows.
        group: the parameter group with its settings.
        keep: None for true.
        divide: see :class:`Muon`.
    """
    nesterov, weights, *squares = (list(part) for part in zip(*tensors, strict=True))
    rows, columns = weights[0].shape
    change = divide(_newton_schulz, torch.stack(nesterov)).float() * max(1.0, rows / columns) ** 0.5
    if squares:
        means = torch.stack(squares[0])
        change = _normalize_rows(change, means, keep)
        torch._foreach_copy_(squares[0], list(means))
    decay = torch.stack(weights) * group["weight_decay"]
    change = (change + decay) * -group["lr"]
    if keep is not None:
        change = change.where(keep, 0.0)
    torch._foreach_add_(weights, list(change))


def _ema_(mean: Tensor, value: Tensor, decay: float, keep: Tensor | None) -> None:
    """Move a running mean on by ``value``, unless ``keep`` is false."""
    if keep is None:
        mean.lerp_(value, 1 - decay)
    else:
        mean.copy_(mean.lerp(value, 1 - decay).where(keep, mean))


def _normalize_rows(updates: Tensor, squares: Tensor, keep: Tensor | None) -> Tensor:
    """``updates [n, rows, columns]`` over the root of each row's running mean of squares
    ``[n, rows, 1]``, which moves on; every matrix with the norm that it had."""
    _ema_(squares, updates.square().mean(dim=2, keepdim=True), NORMUON_DECAY, keep)
    normalized = updates / (squares.sqrt() + 1e-8)
    before, after = (x.norm(dim=(1, 2), keepdim=True) for x in (updates, normalized))
    return normalized * (before / (after + 1e-8))


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest matrices with all singular values 1, roughly: ``[n, rows, columns]`` float32.

    Singular values end between about 0.7 and 1.2.
    """
    return _newton_schulz(matrices).float()


def _newton_schulz(matrices: Tensor) -> Tensor:
    """:func:`orthogonalize` by Newton-Schulz iterations in bfloat16, in which the result stays."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
