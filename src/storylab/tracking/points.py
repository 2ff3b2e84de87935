"""Rows and summaries of the record as named numbers; docs/guide/trackers.md lists the names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Struct

from storylab.record.schema import (
    EvaluationRow,
    IterationRow,
    QuantizationRow,
    Row,
    Sample,
    Summary,
)

# Fields of a row, with the name that trackers show. Panels are made of the part before the slash.
ITERATION_NAMES: Mapping[str, str] = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "clipped": "train/clipped",
    "tokens": "train/tokens",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "data_seconds": "speed/data_seconds",
    "peak_memory_bytes": "memory/peak_bytes",
    "power_watts": "power/watts",
    "utilization_percent": "power/utilization_percent",
    "energy_joules": "power/energy_joules",
}
EVALUATION_NAMES: Mapping[str, str] = {
    "train_loss": "evaluation/train_loss",
    "val_loss": "evaluation/val_loss",
    "best": "evaluation/best",
}
QUANTIZATION_FIELDS = ("error", "underflow", "saturation", "scale_low", "scale_high")
# Of the summary. The test split stays closed: nothing shows its loss but the confirmation of an experiment.
NOT_SENT = ("test", "samples")


@dataclass(frozen=True)
class Point:
    """Numbers of one step.

    Attributes:
        step: iteration.
        seconds: training time from the start of the run to this point.
        values: numbers by name.
    """

    step: int
    seconds: float
    values: Mapping[str, float]


def row_values(row: Row) -> dict[str, float]:
    """The numbers of a row by the names that trackers show; numbers that are not known are left out."""
    match row:
        case IterationRow():
            names = ITERATION_NAMES
        case EvaluationRow():
            names = EVALUATION_NAMES
        case QuantizationRow():
            place = f"quantization/{row.layer}/{row.tensor}/{row.product}"
            names = {field: f"{place}/{field}" for field in QUANTIZATION_FIELDS}
    found = ((name, getattr(row, field)) for field, name in names.items())
    return {name: float(value) for name, value in found if value is not None}


class Clock:
    """Turns rows into points, whose time is the sum of the steps so far.

    A row has no time of its own. Summed steps give the same times however often a run is sent.
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def points(self, rows: Iterable[Row]) -> Iterator[Point]:
        """The points of the rows that follow."""
        for row in rows:
            if isinstance(row, IterationRow):
                self._seconds += row.step_seconds
            yield Point(row.iteration, self._seconds, row_values(row))


class RunEnd(Struct, frozen=True, kw_only=True):
    """The results of a run that has ended."""

    status: str
    """``finished`` or ``diverged``."""
    step: int
    """Number of iterations."""
    values: dict[str, float]
    notes: dict[str, str]
    samples: list[Sample]


def run_end(summary: Summary) -> RunEnd:
    """The results of a run, by names ``final/...``, without those of the test split."""
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    values = msgspec.to_builtins(summary)
    for name, value in _flat({k: v for k, v in values.items() if k not in NOT_SENT}, "final"):
        if isinstance(value, str):
            texts[name] = value
        elif isinstance(value, (bool, int, float)):
            numbers[name] = float(value)
    return RunEnd(
        status=summary.status,
        step=summary.iterations,
        values=numbers,
        notes=texts,
        samples=summary.samples,
    )


def quoted(text: str) -> str:
    """``text`` as a block of code in Markdown: a model can write any markup, which must not act."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _flat(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}/{name}")
        elif isinstance(value, list):
            yield f"{path}/{name}", ", ".join(map(str, value))
        else:
            yield f"{path}/{name}", value
