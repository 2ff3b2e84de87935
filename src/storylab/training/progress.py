"""How far a run has come, and whether it was asked to stop."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from storylab.decode import convert
from storylab.errors import UserError
from storylab.training.step import StepResult
from storylab.training.telemetry import PowerTotals


class StopRequested(Exception):  # noqa: N818
    """Unwinds the iteration or evaluation that a signal cut short."""


@dataclass
class Progress:
    """What a run has done so far; saved with every checkpoint. Times in seconds."""

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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """Rebuild what a checkpoint's header holds.

        Raises:
            UserError: it is of another version.
        """
        if unknown := values.keys() - {field.name for field in fields(cls)}:
            names = ", ".join(sorted(unknown))
            raise UserError(f"the checkpoint is of another version of storylab (it has {names})")
        return convert(cls, values, "its state")


@dataclass(frozen=True)
class PendingIteration:
    """An iteration under way: its result, and the seconds that the host waited for its batch."""

    iteration: int
    result: StepResult
    waited: float


class StopSignal:
    """SIGTERM or Ctrl-C, noted when it comes and acted on where it is safe to leave."""

    def __init__(self) -> None:
        self.number: int | None = None

    def check(self) -> None:
        """Leave the current work if a signal has come."""
        if self.number is not None:
            raise StopRequested

    def note(self, number: int) -> None:
        """A signal has come."""
        self.number = number
