"""The record of an experiment as types: its plan, its runs, and what anyone did with it since."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from storylab.data.manifest import Count

Margin = Annotated[float, Meta(gt=0, le=sys.float_info.max)]


class ExpectationRecord(Struct, frozen=True, kw_only=True):
    """A number that a hypothesis names."""

    text: str
    metric: str
    arm: str
    at_least: float | None
    at_most: float | None
    condition: str | None


class CellRecord(Struct, frozen=True, kw_only=True):
    """An arm under a condition: its config, and its run folders by seed."""

    condition: str
    arm: str
    config: dict[str, Any]
    runs: dict[str, str]


class Registration(Struct, frozen=True, kw_only=True):
    """The plan of an experiment as it was before the first run of it: what a verdict may rest on."""

    sha256: str
    """Of ``plan`` as canonical JSON."""
    time: str
    runs_finished: Count
    """Runs of the experiment that had ended by then."""
    runs_shared: Count = 0
    """Of these, runs that another experiment of the folder had listed."""
    runs_planned: Count = 0
    differences_known: Count = 0
    """Pairs of an arm's and the baseline's run that had both ended by then."""
    plan: dict[str, Any]
    """See :func:`storylab.experiments.registered_plan.plan_of`."""


class Amendment(Struct, frozen=True, kw_only=True):
    """A change after the plan was registered."""

    time: str
    what: str
    """Key of the plan; or ``record``, which was damaged and begun again, or ``runs``, which were all to be
    trained again."""
    before: Any
    after: Any
    runs_finished: Count
    """Runs that had ended by then."""
    runs_planned: Count


class LookTaken(Struct, frozen=True, kw_only=True):
    """Verdicts that somebody was shown."""

    time: str
    seeds: Count
    """Seeds that every arm not yet settled had by then."""
    settled: list[str]
    """Arms, with their condition, settled at this look."""


class Queued(Struct, frozen=True, kw_only=True):
    """The part of an experiment that workers are to train."""

    time: str
    seeds: list[Count]
    arms: list[str]


class Opening(Struct, frozen=True, kw_only=True):
    """Losses on the test split that somebody was shown."""

    time: str
    seeds: Count


class FactorRecord(Struct, frozen=True, kw_only=True):
    """A factor of a factorial experiment."""

    name: str
    levels: Annotated[list[str], Meta(min_length=2, max_length=2)]
    """The base first."""
    fields: list[str]
    """Config fields that it may change."""


class FactorialRecord(Struct, frozen=True, kw_only=True):
    """A factorial design: two-level factors crossed."""

    factors: Annotated[list[FactorRecord], Meta(min_length=2)]
    fraction: Annotated[int, Meta(ge=1)]
    """One in how many of the crossed cells is trained."""
    cells: list[list[Annotated[int, Meta(ge=0, le=1)]]]
    """The level of every factor in each arm, in the order of the arms; 0 is the base."""


class ExperimentRecord(Struct, frozen=True, kw_only=True):
    """``experiments/LABEL.json``: the runs that make up an experiment."""

    name: str
    file: str
    scale: str
    title: str
    purpose: str
    hypothesis: str
    note: str
    waits_for: str
    factor: str
    baseline: str
    arms: list[str]
    conditions: list[str]
    matched: list[str]
    seeds: list[Count]
    margin: Margin | None
    expectations: list[ExpectationRecord]
    cells: list[CellRecord]
    looks: list[Count] = []
    """Numbers of seeds at which verdicts are planned; empty in records of before plans were registered."""
    variance: Literal["moderated", "own", "pooled"] = "moderated"
    stage: Literal["search", "confirm"] = "search"
    registered: Registration | None = None
    amendments: list[Amendment] = []
    looks_taken: list[LookTaken] = []
    openings: list[Opening] = []
    queued: Queued | None = None
    machines: dict[str, str] = {}
    """The class of machines that trains a seed, by seed, where workers train the experiment."""
    factorial: FactorialRecord | None = None
    """The design of an experiment whose arms are crossed factors."""
