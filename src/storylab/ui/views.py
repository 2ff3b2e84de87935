"""The answers that the page fetches, as types. Losses are nats a token, times seconds, memory bytes."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from storylab.record.schema import Sample


class RunRow(Struct, frozen=True, kw_only=True):
    """A run in the list; None where a number is not known."""

    name: str
    state: str
    """``finished``, ``diverged``, ``failed``, ``training``, ``stopped`` or ``damaged``."""
    arm: str = ""
    """Its arm in the first experiment that lists it, with condition and seed; empty if none does."""
    started: str = ""
    fault: str = ""
    """Why it failed, diverged or is damaged."""
    parameters: int | None = None
    iteration: int | None = None
    """Iterations that are done."""
    iterations: int | None = None
    """Iterations of the whole run."""
    tokens: int | None = None
    loss: float | None = None
    """Loss on the whole validation split of a finished run, or the last estimate along the run."""
    speed: float | None = None
    """Tokens a second."""
    memory: int | None = None
    seconds_left: float | None = None


class ExperimentRow(Struct, frozen=True, kw_only=True):
    """An experiment in the list."""

    name: str
    title: str
    done: int = 0
    """Runs that have ended."""
    planned: int = 0
    fault: str = ""
    """Why its record cannot be read."""


class Overview(Struct, frozen=True, kw_only=True):
    """Everything in the folder at a glance."""

    folder: str
    runs: list[RunRow]
    experiments: list[ExperimentRow]


class Curve(Struct, frozen=True, kw_only=True):
    """The course of a run so far. Lists of one kind have equal lengths."""

    name: str
    iterations: list[int]
    losses: list[float | None]
    """Training losses at ``iterations``; each is the mean of the iterations since the one before, None if
    those steps were all skipped."""
    speeds: list[float]
    """Tokens a second at ``iterations``."""
    learning_rates: list[float]
    evaluated: list[int]
    """Iterations done before each evaluation."""
    validation_losses: list[float]
    """Estimates on a few fixed windows."""
    tokens_per_iteration: int


class Detail(Struct, frozen=True, kw_only=True):
    """A run's settings and stories."""

    name: str
    config: dict[str, Any]
    """Fields by name, those of the model as ``model.NAME``."""
    facts: list[tuple[str, str]]
    samples: list[Sample]
