"""How far a run has come, the steps in flight, and a request to stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from storylab.decode import convert
from storylab.errors import UserError
from storylab.record.schema import Rewind
from storylab.record.stages import Prefix
from storylab.training.ranks import ONE_PROCESS, Ranks
from storylab.training.step import DeviceStepMetrics, NonFiniteError, StepMetrics
from storylab.training.telemetry import PowerTotals


class StopRequested(Exception):  # noqa: N818
    """Unwinds the iteration or evaluation that a signal interrupted."""


@dataclass
class RunProgress:
    """Progress of a run so far; saved with every checkpoint. Times in seconds."""

    next_iteration: int = 0
    last_line: int = 0
    seconds_since_line: float = 0.0
    seconds: float = 0.0
    training_seconds: float = 0.0
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_iteration: int | None = None
    peak_memory_bytes: int = 0
    power: PowerTotals = field(default_factory=PowerTotals)
    scaler: dict[str, Any] = field(default_factory=dict)
    prefixes: dict[str, Prefix] = field(default_factory=dict)
    """Rows and log as they were when the checkpoint was saved."""
    skipped: int = 0
    """Steps that were left out; ``skipped_in_a_row`` of them up to iteration ``last_skipped``."""
    skipped_in_a_row: int = 0
    last_skipped: int = 0
    rewinds: list[Rewind] = field(default_factory=list)

    def batch(self, iteration: int) -> int:
        """Number of the batch that an iteration reads: its own, unless a rewind has passed over some."""
        return iteration + sum(rewind.batches for rewind in self.rewinds)

    def go_back(self, point: RunProgress, rewind: Rewind) -> None:
        """Go back to the progress of an earlier ``point``; meters and the clock of the whole run go on."""
        for name in ("next_iteration", "last_line", "training_seconds", "train_loss", "val_loss"):
            setattr(self, name, getattr(point, name))
        self.best_val_loss, self.best_iteration = point.best_val_loss, point.best_iteration
        self.rewinds = [*self.rewinds, rewind]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunProgress:
        """Rebuild the progress from a checkpoint's header.

        Raises:
            UserError: it is of another version.
        """
        if unknown := values.keys() - {field.name for field in fields(cls)}:
            names = ", ".join(sorted(unknown))
            raise UserError(f"the checkpoint is of another version of storylab (it has {names})")
        return convert(cls, values, "its state")


@dataclass(frozen=True)
class InFlightStep:
    """An iteration under way: its result, and the seconds that the host waited for its batch."""

    iteration: int
    result: DeviceStepMetrics
    waited: float


class StopSignal:
    """SIGTERM or Ctrl-C, noted when it comes and acted on where it is safe to leave."""

    def __init__(self, ranks: Ranks = ONE_PROCESS) -> None:
        self.number: int | None = None
        self._ranks = ranks

    def check(self) -> None:
        """Leave the current work if a signal has come to any process of the run; all ask at once."""
        if number := self._ranks.highest(self.number or 0):
            self.number = number
            raise StopRequested

    def note(self, number: int) -> None:
        """A signal has come."""
        self.number = number


def runs_ahead(device: torch.device) -> bool:
    """Whether the host gains by starting steps before earlier ones are read; on a CPU it does not."""
    return device.type == "cuda"


class StepsInFlight:
    """Steps that were started and not read yet, in order.

    On a GPU the host runs ahead until a line is due, so only the time of all of them together is known.

    Args:
        device: the device of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.runs_ahead = runs_ahead(device)
        self._steps: list[InFlightStep] = []
        self._since = 0.0

    def add(self, step: InFlightStep, started: float) -> None:
        """Add a step that began at ``started``, by ``time.perf_counter``."""
        if not self._steps:
            self._since = started
        self._steps.append(step)

    def read(
        self, skips: Callable[[int], bool] = lambda iteration: False
    ) -> tuple[list[tuple[InFlightStep, StepMetrics]], float, NonFiniteError | None]:
        """Wait for the steps; returns those before one that is not finite, when the first of them began,
        and that fault. Steps after a fault are of no use, unless its iteration ``skips`` the step."""
        steps, self._steps = self._steps, []
        done: list[tuple[InFlightStep, StepMetrics]] = []
        for step, result in zip(steps, on_host([step.result for step in steps]), strict=True):
            try:
                done.append((step, result.read()))
            except NonFiniteError as error:
                if not skips(step.iteration):
                    return done, self._since, error
                done.append((step, result.skipped(error)))
        return done, self._since, None


def on_host(results: Sequence[DeviceStepMetrics]) -> list[DeviceStepMetrics]:
    """The results with their numbers on the host, by one copy for all, as a GPU idles for each copy."""
    if not results:
        return []
    numbers = [x for each in results for x in (each.loss, each.grad_norm.to(each.loss))]
    pairs = torch.stack(numbers).cpu().view(-1, 2)
    return [
        dataclasses.replace(each, loss=loss, grad_norm=norm)
        for each, (loss, norm) in zip(results, pairs, strict=True)
    ]
