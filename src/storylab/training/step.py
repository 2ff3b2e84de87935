"""One optimizer step over one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from storylab.model.transformer import Transformer
from storylab.training.optimizers import set_learning_rate
from storylab.training.precision import Precision


class NonFiniteError(ArithmeticError):
    """Loss or gradients are not finite; the weights are still those from before the step."""


@dataclass(frozen=True)
class StepResult:
    """What a step reports; ``grad_norm`` is before clipping, None where float16 skipped the step."""

    loss: float
    grad_norm: float | None
    clipped: bool


def training_step(
    model: Transformer,
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    precision: Precision,
    batch: Tensor,
    *,
    micro_batch: int,
    learning_rate: float,
    grad_clip: float,
    check: Callable[[], None] = lambda: None,
) -> StepResult:
    """Accumulate the gradient of the batch's mean loss over micro-batches, clip it, and update.

    Args:
        batch: ``[S, T + 1]`` int64 token windows.
        micro_batch: windows in memory at once; does not change the result beyond rounding.
        learning_rate: for this step.
        grad_clip: largest global gradient norm; 0 for none.
        check: called between micro-batches; it may raise to leave, the weights being untouched.

    Raises:
        NonFiniteError: the loss, or under another precision than float16 the gradient, is not
            finite. Weights and optimizer state are as before the step.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=precision.device)
    for windows in batch.split(micro_batch):
        check()
        windows = windows.to(precision.device, non_blocking=True)
        with precision.autocast():
            loss = model.loss(windows[:, :-1], windows[:, 1:]) * (len(windows) / len(batch))
        scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    limit = grad_clip or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    mean_loss = float(total)
    if not math.isfinite(mean_loss):
        raise NonFiniteError(f"loss is {mean_loss}")
    skipped = not math.isfinite(norm)
    if skipped and not scaler.is_enabled():
        raise NonFiniteError(f"gradient norm is {norm}")
    if not skipped:
        set_learning_rate(optimizers, learning_rate)
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    if skipped and scaler.get_scale() < 1:
        raise NonFiniteError(f"gradient norm is {norm} at every float16 loss scale")
    return StepResult(mean_loss, None if skipped else norm, not skipped and norm > limit)
