"""The plan of an experiment before its first run, every change since, and both in words."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from storylab.config import TrainConfig, from_dict, to_dict
from storylab.errors import UserError
from storylab.experiments.experiment import Cell, Experiment, counted_up
from storylab.experiments.factors import changed_fields, under
from storylab.record.experiment_schema import Amendment, ExperimentRecord, Registration
from storylab.record.provenance import code_sha256, representative

# Fields of a config that a plan leaves out: seeds have a key of their own, folders are a machine's.
NOT_PLANNED = ("seed", "data_seed", "data_dir", "out_dir")
# Changes that leave the verdicts as they are: the report says them all the same.
HARMLESS = {"hypothesis", "code", "record", "runs"}
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


@dataclass(frozen=True)
class Progress:
    """How far the runs of an experiment are.

    Attributes:
        finished: runs that have ended.
        shared: of these, runs that another experiment lists.
        planned: all runs.
    """

    finished: int
    shared: int
    planned: int


def plan_of(experiment: Experiment, cells: Iterable[Cell], fingerprint: str) -> dict[str, Any]:
    """The plan of an experiment as plain JSON values: all that a verdict rests on, besides the runs.

    Args:
        experiment: all of it.
        cells: its cells with device and data filled in.
        fingerprint: of the data set.
    """
    arms: dict[str, dict[str, Any]] = {}
    for cell in cells:
        config = {k: v for k, v in to_dict(cell.config).items() if k not in NOT_PLANNED}
        arms.setdefault(cell.condition, {})[cell.arm] = config
    plan = {
        "stage": experiment.stage,
        "factor": experiment.factor,
        "baseline": experiment.baseline,
        "conditions": experiment.conditions,
        "matched": experiment.matched,
        "arms": arms,
        "seeds": experiment.seeds,
        "looks": experiment.looks,
        "variance": experiment.variance,
        "margin": experiment.margin,
        "expectations": [dataclasses.asdict(entry) for entry in experiment.expectations],
        "hypothesis": experiment.hypothesis,
        "data": fingerprint,
        "code": code_sha256(),
    }
    if experiment.factorial:
        plan["factorial"] = dataclasses.asdict(experiment.factorial)
    plain: dict[str, Any] = json.loads(_canonical(plan))
    return plain


def _canonical(plan: dict[str, Any]) -> str:
    return json.dumps(plan, sort_keys=True, separators=(",", ":"), allow_nan=False)


def register(plan: dict[str, Any], progress: Progress) -> Registration:
    """The registration of a plan, at this moment."""
    return Registration(
        sha256=hashlib.sha256(_canonical(plan).encode()).hexdigest(),
        time=now(),
        runs_finished=progress.finished,
        runs_shared=progress.shared,
        runs_planned=progress.planned,
        plan=plan,
    )


def now() -> str:
    """This moment, for a record."""
    return time.strftime(TIME_FORMAT)


def amendment(what: str, before: Any, after: Any, progress: Progress) -> Amendment:
    """A change at this moment."""
    return Amendment(
        time=now(),
        what=what,
        before=before,
        after=after,
        runs_finished=progress.finished,
        runs_planned=progress.planned,
    )


def amendments(
    registered: Registration,
    earlier: Iterable[Amendment],
    plan: dict[str, Any],
    progress: Progress,
) -> list[Amendment]:
    """The changes between a registered plan, with its ``earlier`` amendments, and ``plan``."""
    current = amended_plan(registered, earlier)
    found = []
    for key, value in plan.items():
        before = current.get(key)
        if key == "arms":
            before, value = _changed_arms(before or {}, value)
        if not _is_same(key, before, value):
            found.append(amendment(key, before, value, progress))
    return found


def amended_plan(registered: Registration, earlier: Iterable[Amendment]) -> dict[str, Any]:
    """The plan that holds after the amendments."""
    plan = copy.deepcopy(registered.plan)
    for change in earlier:
        if change.what == "arms":
            for condition, arms in change.before.items():
                for arm in arms:
                    del plan["arms"][condition][arm]
            for condition, arms in change.after.items():
                plan["arms"].setdefault(condition, {}).update(arms)
        elif change.what in plan:
            plan[change.what] = change.after
    return plan


def _is_same(key: str, before: Any, after: Any) -> bool:
    if key == "code" and isinstance(before, str):
        return representative(before) == representative(after)
    if key == "seeds" and before:
        # The list goes on by counting up, so that more of the same seeds are no change.
        count = max(len(before), len(after))
        return counted_up(before, count) == counted_up(after, count)
    return bool(before == after)


Arms = dict[str, dict[str, Any]]


def _changed_arms(before: Arms, after: Arms) -> tuple[Arms, Arms]:
    """The configs that differ, by condition and arm; those of arms that came or went are in one only."""
    left: Arms = {}
    right: Arms = {}
    for condition in {**before, **after}:
        old, new = before.get(condition, {}), after.get(condition, {})
        for arm in {**old, **new}:
            if arm in old and arm in new and not changed_config(old[arm], new[arm]):
                continue
            if arm in old:
                left.setdefault(condition, {})[arm] = old[arm]
            if arm in new:
                right.setdefault(condition, {})[arm] = new[arm]
    return left, right


def changed_config(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that decide a run's result and differ between two configs of plans."""
    try:
        return changed_fields(_parsed(before), _parsed(after))
    except UserError:  # one is of a version with other fields
        names = {**before, **after}
        pairs = {name: (before.get(name), after.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _parsed(values: dict[str, Any]) -> TrainConfig:
    default = to_dict(TrainConfig())
    return from_dict({name: default[name] for name in NOT_PLANNED} | values)


def registration_lines(record: ExperimentRecord) -> list[str]:
    """When the plan was registered, and every change since, a line each."""
    registered = record.registered
    if registered is None:
        return ["not registered (record of an older version)"]
    lines = [_registered_line(registered)]
    for change in record.amendments:
        exploratory = ": exploratory" if _is_exploratory(change) else ""
        lines.append(f"{_change_words(change)} {_when(change)}{exploratory}")
    return lines


def exploratory_reasons(record: ExperimentRecord) -> list[str]:
    """Why the verdicts of an experiment are exploratory, a few words each; empty if they are not."""
    registered = record.registered
    if registered is None:
        return ["not registered"]
    reasons = []
    if registered.runs_finished > registered.runs_shared:
        reasons.append(_registered_line(registered))
    reasons += [
        f"{change.what} changed {_when(change)}"
        for change in record.amendments
        if _is_exploratory(change)
    ]
    return list(dict.fromkeys(reasons))


def _is_exploratory(change: Amendment) -> bool:
    return change.runs_finished > 0 and change.what not in HARMLESS


def _registered_line(registered: Registration) -> str:
    finished, shared = registered.runs_finished, registered.runs_shared
    if not finished:
        return "registered before any run"
    line = f"registered after {finished} of {registered.runs_planned} runs had finished"
    if shared == finished:
        return f"{line}, all of them for another experiment"
    return f"{line}, {shared} of them for another experiment" if shared else line


def _when(change: Amendment) -> str:
    if not change.runs_finished:
        return "before any run had finished"
    return f"after {change.runs_finished} of {change.runs_planned} runs"


def _change_words(change: Amendment) -> str:
    what, before, after = change.what, change.before, change.after
    if what == "record":
        return f"the record was begun again ({before})"
    if what == "runs":
        return "all runs were trained again (--fresh)"
    if what == "code":
        return f"code {str(before)[:8]} -> {str(after)[:8]}"
    if what == "arms":
        return "; ".join(_arm_words(before, after))
    if what in ("hypothesis", "expectations", "factorial"):
        return f"{what} changed"
    return f"{what} {_value_words(before)} -> {_value_words(after)}"


def _value_words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(entry) or "no condition" for entry in value) or "none"
    return "none" if value is None or value == "" else str(value)


def _arm_words(before: Arms, after: Arms) -> Iterator[str]:
    for condition in {**before, **after}:
        old, new = before.get(condition, {}), after.get(condition, {})
        for arm in {**old, **new}:
            name = under(arm, condition)
            if arm not in old:
                yield f"arm '{name}' added"
            elif arm not in new:
                yield f"arm '{name}' removed"
            else:
                changed = changed_config(old[arm], new[arm]).items()
                values = (f"{field} {a} -> {b}" for field, (a, b) in changed)
                yield f"arm '{name}': {', '.join(values)}"


def registered_values(
    before: ExperimentRecord | None,
    plan: dict[str, Any],
    progress: Progress,
    damage: str = "",
    fresh: bool = False,
) -> dict[str, Any]:
    """The keys of a record that keep its history, brought up to date with ``plan``.

    Args:
        before: the record so far, or None.
        plan: as the file has it now.
        progress: of the runs of ``before`` and of the plan.
        damage: why an earlier record could not be read, if there was one.
        fresh: whether to train all runs again.
    """
    changes = list(before.amendments) if before else []
    registered = before.registered if before else None
    if registered is None:
        registered = register(plan, progress)
    else:
        changes += amendments(registered, changes, plan, progress)
    if damage:
        changes.append(amendment("record", damage, None, progress))
    if fresh and progress.finished:
        changes.append(amendment("runs", progress.finished, None, progress))
    return {
        "registered": structs.asdict(registered),
        "amendments": [structs.asdict(change) for change in changes],
        "looks_taken": [structs.asdict(look) for look in before.looks_taken] if before else [],
        "openings": [structs.asdict(opening) for opening in before.openings] if before else [],
    }
