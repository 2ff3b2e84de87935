"""The optimizers of a run: AdamW, alone or beside Muon or NorMuon for the matrices of the blocks."""

from __future__ import annotations

from collections import defaultdict
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
# Decay of the squares that NorMuon keeps of every row (Li et al. 2025, arXiv 2510.05491).
NORMUON_DECAY = 0.95


def build_optimizers(model: Transformer, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """What updates ``model``: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), which decays
    matrices and not norm gains, and before it Muon where the config says so.

    The ``lr_ratio`` of a parameter group is its learning rate over the step's.
    """
    matrices = dict(model.block_matrices()) if config.optimizer != "adamw" else {}
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            Muon(
                matrices.items(),
                lr=config.matrix_lr,
                weight_decay=config.weight_decay,
                cautious=config.cautious_decay,
                normalize_rows=config.optimizer == "normuon",
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
    for optimizer in optimizers:
        require_skipping(optimizer)
    return optimizers


def require_skipping(optimizer: torch.optim.Optimizer) -> None:
    """Make sure that an optimizer leaves weights and state alone where ``found_inf`` is set, see
    :func:`skip_where`. torch's do so if fused, by an attribute that torch.amp.GradScaler goes by too;
    others ignore it and would write NaN.

    Raises:
        TypeError: it does not say so.
    """
    if not (
        getattr(optimizer, "skips_where_found_inf", False)
        or getattr(optimizer, "_step_supports_amp_scaling", False)
    ):
        raise TypeError(
            f"{type(optimizer).__name__} does not heed found_inf, so a step whose gradient is not "
            "finite would spoil the weights: use its fused form, or heed it and set "
            "skips_where_found_inf"
        )


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
        normalize_rows: divide every row of an update by the root of a running mean of its squares,
            and give the whole the norm that it had (NorMuon, Li et al. 2025, arXiv 2510.05491, but
            for that norm, which makes lr mean the same with and without).
    """

    skips_where_found_inf = True

    def __init__(
        self,
        matrices: Iterable[tuple[Tensor, Sequence[int]]],
        lr: float,
        weight_decay: float,
        cautious: bool,
        normalize_rows: bool = False,
    ) -> None:
        joined = list(matrices)
        defaults = {"lr": lr, "weight_decay": weight_decay, "cautious": cautious}
        defaults["normalize_rows"] = normalize_rows
        super().__init__([p for p, _ in joined], defaults)
        self.rows = {p: tuple(rows) for p, rows in joined}

    @property
    def state_names(self) -> frozenset[str]:
        """Names of the state that is kept for every matrix."""
        squares = ["row_squares"] if self.defaults["normalize_rows"] else []
        return frozenset(["momentum", *squares])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients at hand."""
        assert closure is None
        skip: Tensor | None = getattr(self, "found_inf", None)
        keep = None if skip is None else skip == 0
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, ...]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                    if group["normalize_rows"]:
                        state["row_squares"] = torch.zeros_like(parameter[:, :1])
                _advance(state["momentum"], parameter.grad, MUON_MOMENTUM, keep)
                ahead = parameter.grad.lerp(state["momentum"], MUON_MOMENTUM)
                joined = [parameter, ahead]
                joined += [state["row_squares"]] if group["normalize_rows"] else []
                for parts in zip(*(t.split(self.rows[parameter]) for t in joined), strict=True):
                    shapes[parts[0].shape].append(parts)
            for alike in shapes.values():
                _update_alike(alike, group, keep)


def _update_alike(
    alike: Sequence[tuple[Tensor, ...]], group: dict[str, Any], keep: Tensor | None
) -> None:
    """Update matrices of one shape together, where ``keep`` (a bool scalar) is not false.

    Args:
        alike: for each its weight and momentum ``[rows, columns]``, and its row squares ``[rows, 1]``
            where the group normalises rows.
        group: the parameter group with its settings.
        keep: None for true.
    """
    weights, ahead, *squares = (list(tensors) for tensors in zip(*alike, strict=True))
    rows, columns = weights[0].shape
    change = orthogonalize(torch.stack(ahead)) * max(1.0, rows / columns) ** 0.5
    if squares:
        means = torch.stack(squares[0])
        change = _with_rows_alike(change, means, keep)
        torch._foreach_copy_(squares[0], list(means))
    shrink = torch.stack(weights) * group["weight_decay"]
    if group["cautious"]:
        shrink *= shrink * change > 0
    change = (change + shrink) * -group["lr"]
    if keep is not None:
        change = change.where(keep, 0.0)
    torch._foreach_add_(weights, list(change))


def _advance(mean: Tensor, value: Tensor, decay: float, keep: Tensor | None) -> None:
    """Move a running mean on by ``value``, unless ``keep`` is false."""
    if keep is None:
        mean.lerp_(value, 1 - decay)
    else:
        mean.copy_(mean.lerp(value, 1 - decay).where(keep, mean))


def _with_rows_alike(updates: Tensor, squares: Tensor, keep: Tensor | None) -> Tensor:
    """``updates [n, rows, columns]`` over the root of each row's running mean of squares
    ``[n, rows, 1]``, which moves on; every matrix with the norm that it had."""
    _advance(squares, updates.square().mean(dim=2, keepdim=True), NORMUON_DECAY, keep)
    alike = updates / (squares.sqrt() + 1e-8)
    before, after = (x.norm(dim=(1, 2), keepdim=True) for x in (updates, alike))
    return alike * (before / (after + 1e-8))


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
