"""One optimizer step over one batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from storylab.model.transformer import Transformer
from storylab.optim.build import set_learning_rate, skip_where
from storylab.training.precision import ComputePolicy
from storylab.training.ranks import ONE_PROCESS, Ranks


class NonFiniteError(ArithmeticError):
    """Loss or gradients are not finite; the weights are still those from before the step."""


@dataclass(frozen=True)
class StepMetrics:
    """Loss in nats and gradient norm of a step.

    The norm is the one before clipping, None where the step was skipped: because a scaled float16 gradient
    overflowed, or for the fault, where there is one. The loss is None if it was not finite.
    """

    loss: float | None
    grad_norm: float | None
    clipped: bool
    fault: str = ""


@dataclass(frozen=True)
class DeviceStepMetrics:
    """Loss and gradient norm of a step as scalars on its device, so that the host need not wait.

    Attributes:
        loss: mean over the batch, in nats.
        grad_norm: before clipping.
        max_norm: norm above which the gradient was clipped.
        scale: of a float16 loss; None in other precisions.
    """

    loss: Tensor
    grad_norm: Tensor
    max_norm: float
    scale: float | None = None

    def read(self) -> StepMetrics:
        """Wait for the step and report it.

        Raises:
            NonFiniteError: loss or gradient was not finite.
        """
        loss, norm = torch.stack((self.loss, self.grad_norm.to(self.loss))).tolist()
        if not math.isfinite(loss):
            raise NonFiniteError(f"loss is {loss}")
        if math.isfinite(norm):
            return StepMetrics(loss, norm, norm > self.max_norm)
        if self.scale is None:
            raise NonFiniteError(f"gradient norm is {norm}")
        if self.scale < 1:
            raise NonFiniteError(f"gradient norm is {norm} at every float16 loss scale")
        return StepMetrics(loss, None, False)

    def skipped(self, error: NonFiniteError) -> StepMetrics:
        """The report of a step that was left out because of ``error``."""
        loss = float(self.loss)
        return StepMetrics(loss if math.isfinite(loss) else None, None, False, str(error))


def training_step(
    model: Transformer,
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    precision: ComputePolicy,
    batch: Tensor,
    *,
    micro_batch: int,
    learning_rate: float,
    grad_clip: float,
    skips: bool = False,
    between: Callable[[], None] = lambda: None,
    ranks: Ranks = ONE_PROCESS,
) -> DeviceStepMetrics:
    """Accumulate the gradient of the batch's mean loss, clip it, and update if both are finite.

    Args:
        batch: ``[S, T + 1]`` int64 token windows on the model's device.
        micro_batch: windows in memory at once; does not change the result beyond rounding.
        learning_rate: for this step.
        grad_clip: largest global gradient norm; 0 for none.
        skips: leave a step that is not finite out without raising, as under ``on_divergence`` skip; the
            result's ``read`` raises.
        between: called where it may raise and the weights are untouched.
        ranks: the processes that share the micro-batches; see :meth:`Ranks.micro_batches`.

    Raises:
        NonFiniteError: the loss, or a gradient of another precision than float16, is not finite; on
            CUDA the result's ``read`` raises it.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss = _accumulate_gradient(model, scaler, precision, batch.split(micro_batch), between, ranks)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    max_norm = grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    set_learning_rate(optimizers, learning_rate)
    result = DeviceStepMetrics(loss, norm, max_norm)
    if scaler.is_enabled():
        return _scaled_update(result, optimizers, scaler, skips)
    _update(result, optimizers, skips)
    return result


def _accumulate_gradient(
    model: Transformer,
    scaler: torch.amp.GradScaler,
    precision: ComputePolicy,
    parts: Sequence[Tensor],
    between: Callable[[], None],
    ranks: Ranks,
) -> Tensor:
    """Add the gradient of the mean loss of all ``parts [s, T + 1]`` to the parameters; returns that loss, a
    scalar."""
    total = torch.zeros((), device=parts[0].device)
    sequences = sum(map(len, parts))
    for windows in ranks.micro_batches(parts, between):
        with precision.autocast():
            loss = model(windows[:, :-1], windows[:, 1:]) * (len(windows) / sequences)
        scaler.scale(loss).backward()
        total += loss.detach()
    return ranks.sum_gradients(model, total)


def _update(
    result: DeviceStepMetrics, optimizers: Sequence[torch.optim.Optimizer], skips: bool
) -> None:
    """The update of a step, left out where loss or gradient is not finite.

    On CUDA the host does not wait to see that; elsewhere such a step raises before its update, unless it
    ``skips``.
    """
    if result.loss.device.type == "cuda":
        skip_where(optimizers, ~(result.loss + result.grad_norm).isfinite())
    elif not skips:
        result.read()
    elif not math.isfinite(float(result.loss) + float(result.grad_norm)):
        return
    for optimizer in optimizers:
        optimizer.step()


def _scaled_update(
    result: DeviceStepMetrics,
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    skips: bool,
) -> DeviceStepMetrics:
    """The update of a float16 step, left out where its scaled gradient overflowed. The host waits."""
    loss, norm = float(result.loss), float(result.grad_norm)
    if math.isfinite(loss) and math.isfinite(norm):
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()  # also after a loss that is not finite, or the next step could not begin
    result = dataclasses.replace(result, scale=scaler.get_scale())
    if not skips:
        result.read()
    return result
