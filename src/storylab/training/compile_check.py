"""Prove that a compiled model computes the same as the uncompiled one, before a run relies on it.

Compilers miscompile: gcc 12.2 gave NaN for the gradients of rotated keys while the loss was right. So a
run takes loss and every gradient of one micro-batch three times: compiled, uncompiled in the same
precision, and uncompiled in float32. The error of the uncompiled 16-bit pass against float32 shows
the effect of rounding; the compiled pass may err by a few times as much. Measured, the ratio of the
two is 0.93 to 1.11 for every tensor of `nano`; a wrong kernel is off by a tenth of its values or
more.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from storylab.training.precision import ComputePolicy
from storylab.training.state import TrainState

# How many times the rounding error of the uncompiled pass the compiled one may have. A tensor's error is
# a norm over many values and hardly varies. A handful of scalars, such as residual scales, may by chance
# have next to no error in one of the passes, so these are judged together and more loosely.
RATIO, FEW_RATIO = 3.0, 30.0
FEW = 64
# Share of a gradient's norm by which it may always be off: two orders of adding up differ by this
# much in float32, and by the second number where a handful of values cancel out.
FLOOR, FEW_FLOOR = 1e-4, 2e-2
# The same for the loss: 16-bit passes of 113M parameters were within 3e-4 nats of float32.
LOSS_FLOOR = 2e-3
# Uncompiled passes take a micro-batch in this many pieces, so that they need no more memory than training.
PIECES = 4
# Of float16 losses in these passes, whose gradients would underflow without.
FLOAT16_SCALE = 1024.0
THE_FEW = "the scalars together"


@dataclass(frozen=True)
class CompileCheck:
    """How near the compiled pass came to the uncompiled one.

    Attributes:
        seconds: that the check took, compiling included.
        loss: of the compiled pass, in nats.
        loss_uncompiled: in the same precision.
        worst: name of the gradient whose error is the largest share of its limit.
        share: that share. Above 1 the kernels are wrong; values that are not finite count as infinite.
        finite: whether the uncompiled float32 pass is finite; where it is not, the check has no result.
    """

    seconds: float
    loss: float
    loss_uncompiled: float
    worst: str
    share: float
    finite: bool

    @property
    def passed(self) -> bool:
        """Whether the compiled model may be used."""
        return self.share <= 1 or not self.finite

    @property
    def fault(self) -> str:
        """Describe the fault, for a message."""
        if self.worst == "loss":
            return f"loss {self.loss:.4f} instead of {self.loss_uncompiled:.4f}"
        times = (
            "not finite" if math.isinf(self.share) else f"off by {self.share:,.1f} times the bound"
        )
        return f"the gradient of {self.worst} is {times}"

    def to_dict(self) -> dict[str, object]:
        """As JSON values; a share that is infinite is None."""
        values = dataclasses.asdict(self) | {"passed": self.passed}
        return {k: None if v in (math.inf, -math.inf) or v != v else v for k, v in values.items()}


def check_compiled(
    state: TrainState,
    windows: Tensor,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> CompileCheck:
    """Compare loss and gradients of a compiled model with those of the same model uncompiled.

    Weights, optimizer and random numbers stay as they are; gradients are left empty.

    Args:
        state: its model is compiled.
        windows: ``[S, T + 1]`` int64, a micro-batch of the size that is trained on.
        tick: called before each of the three passes; may raise to leave.
    """
    started = time.perf_counter()
    precision = state.precision
    wide = ComputePolicy(precision.device, torch.float32)
    named = list(state.model.named_parameters())
    try:
        tick(0, 3)
        wide_loss, right = _uncompiled(state, windows, wide)
        tick(1, 3)
        loss_uncompiled, gradients = _uncompiled(state, windows, precision)
        rounding = [_distance(g, r) for g, r in zip(gradients, right, strict=True)]
        norms = [_norm(r) for r in right]
        del gradients
        tick(2, 3)
        loss, gradients = _gradients(state, windows, precision)
        errors = [_distance(g, r) for g, r in zip(gradients, right, strict=True)]
    finally:
        state.model.zero_grad(set_to_none=True)
    finite = math.isfinite(wide_loss) and all(map(math.isfinite, norms))
    shares = dict(_shares([(n, p.numel()) for n, p in named], errors, rounding, norms))
    allowed = max(RATIO * abs(loss_uncompiled - wide_loss), LOSS_FLOOR * max(1.0, abs(wide_loss)))
    shares["loss"] = _share(abs(loss - wide_loss), allowed)
    worst = max(shares, key=lambda name: shares[name])
    seconds = time.perf_counter() - started
    return CompileCheck(seconds, loss, loss_uncompiled, worst, shares[worst], finite)


def compiler_is_to_blame(state: TrainState, batch: Tensor) -> bool:
    """Whether loss or gradients of a batch ``[S, T + 1]`` are finite uncompiled and not finite compiled."""
    try:
        rows = state.config.batch_size
        compiled = _gradients(state, batch, state.precision, rows)
        return not _finite(*compiled) and _finite(*_uncompiled(state, batch, state.precision))
    finally:
        state.model.zero_grad(set_to_none=True)


def _finite(loss: float, gradients: list[Tensor]) -> bool:
    return math.isfinite(loss) and all(math.isfinite(_norm(gradient)) for gradient in gradients)


def _uncompiled(
    state: TrainState, windows: Tensor, precision: ComputePolicy
) -> tuple[float, list[Tensor]]:
    """:func:`_gradients` without compiled code, in parts of a micro-batch."""
    rows = max(1, min(state.config.batch_size, len(windows)) // PIECES)
    with torch.compiler.set_stance("force_eager"):
        return _gradients(state, windows, precision, rows)


def _gradients(
    state: TrainState,
    windows: Tensor,
    precision: ComputePolicy,
    rows: int | None = None,
) -> tuple[float, list[Tensor]]:
    """Mean loss of ``windows`` and its gradient for every parameter, taken ``rows`` windows at a time."""
    model = state.model
    model.zero_grad(set_to_none=True)
    scale = FLOAT16_SCALE if precision.dtype == torch.float16 else 1.0
    total = torch.zeros((), device=windows.device)
    for part in windows.split(rows or len(windows)):
        with precision.autocast():
            loss = model(part[:, :-1], part[:, 1:]) * (len(part) / len(windows))
        (loss * scale).backward()
        total += loss.detach()
    gradients = []
    for parameter in model.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.append(gradient.div_(scale))
        parameter.grad = None
    return float(total), gradients


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def _distance(values: Tensor, right: Tensor) -> float:
    """Norm of the difference; infinite where a value is not finite."""
    found = _norm(values - right)
    return found if math.isfinite(found) else math.inf


def _shares(
    named: list[tuple[str, int]], errors: list[float], rounding: list[float], norms: list[float]
) -> Iterator[tuple[str, float]]:
    """Error of every gradient as a share of its limit; gradients of a few values count together."""
    few = [number for number, (_, numel) in enumerate(named) if numel < FEW]
    for number, (name, numel) in enumerate(named):
        if numel >= FEW:
            allowed = RATIO * rounding[number] + FLOOR * norms[number]
            yield name, _share(errors[number], allowed)
    if few:
        error, own, norm = (
            math.hypot(*(x[number] for number in few)) for x in (errors, rounding, norms)
        )
        yield THE_FEW, _share(error, FEW_RATIO * own + FEW_FLOOR * norm)


def _share(error: float, allowed: float) -> float:
    if not math.isfinite(error):
        return math.inf
    return error / allowed if allowed > 0 else (0.0 if error == 0 else math.inf)
