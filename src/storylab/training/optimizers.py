"""The optimizers of a run: AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from storylab.config import TrainConfig
from storylab.model.transformer import Transformer

# Coefficients and number of the iterations that bring singular values near 1 (Jordan et al. 2024,
# Muon, https://kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MUON_MOMENTUM = 0.95


def build_optimizers(model: Transformer, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """What updates ``model``: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), which decays
    matrices and not norm gains, and before it Muon where the config says so.

    The ``lr_ratio`` of a parameter group is its learning rate over the step's.
    """
    matrices = dict(model.block_matrices()) if config.optimizer == "muon" else {}
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            Muon(
                matrices.items(),
                lr=config.matrix_lr,
                weight_decay=config.weight_decay,
                cautious=config.cautious_decay,
            )
        )
        optimizers[0].param_groups[0]["lr_ratio"] = config.matrix_lr / config.learning_rate
    rest = [p for p in model.parameters() if p not in matrices]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True))
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Give every parameter group its learning rate where the run's is ``learning_rate``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


def skip_where(optimizers: Iterable[torch.optim.Optimizer], skip: Tensor) -> None:
    """Let the next step change nothing where ``skip`` (a bool scalar) is true, without reading it.

    By the attribute that torch's fused optimizers look at, see torch.amp.GradScaler.
    """
    for optimizer in optimizers:
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]


class Muon(torch.optim.Optimizer):
    """Momentum whose update has all singular values near 1 (Jordan et al. 2024, see above).

    ``W -= lr * sqrt(max(1, rows / columns)) * orthogonalize(nesterov momentum)``, with decoupled
    weight decay. Matrices of one shape are worked on together.

    Args:
        matrices: each weight ``[rows, columns]`` with the rows of the projections that it joins,
            each of which is updated as a matrix of its own.
        lr: learning rate.
        weight_decay: share of lr by which a weight shrinks.
        cautious: shrink an entry only where the update does too (Chen et al. 2025, arXiv 2510.12402).
    """

    def __init__(
        self,
        matrices: Iterable[tuple[Tensor, Sequence[int]]],
        lr: float,
        weight_decay: float,
        cautious: bool,
    ) -> None:
        joined = list(matrices)
        defaults = {"lr": lr, "weight_decay": weight_decay, "cautious": cautious}
        super().__init__([p for p, _ in joined], defaults)
        self.rows = {p: tuple(rows) for p, rows in joined}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients at hand."""
        assert closure is None
        skip: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                moved = momentum.lerp(parameter.grad, 1 - MUON_MOMENTUM)
                momentum.copy_(moved if skip is None else moved.where(skip == 0, momentum))
                ahead = parameter.grad.lerp(momentum, MUON_MOMENTUM)
                rows = self.rows[parameter]
                for weight, update in zip(parameter.split(rows), ahead.split(rows), strict=True):
                    shapes.setdefault(weight.shape, []).append((weight, update))
            for shape, parts in shapes.items():
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                updates = orthogonalize(torch.stack([update for _, update in parts])) * scale
                for (weight, _), update in zip(parts, updates, strict=True):
                    shrink = weight * group["weight_decay"]
                    if group["cautious"]:
                        shrink *= weight * update > 0
                    change = (update + shrink) * -group["lr"]
                    weight.add_(change if skip is None else change.where(skip == 0, 0.0))


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest matrices with all singular values 1, roughly: ``[n, rows, columns]`` float32.

    Newton-Schulz iterations in bfloat16; singular values end between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).float()
