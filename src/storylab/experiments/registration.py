"""The plan of an experiment before its first run, every change since, and both in words."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from msgspec import structs

from storylab.data.tally import plural
from storylab.experiments.factors import qualified_name
from storylab.experiments.registered_plan import (
    Arms,
    amended_plan,
    canonical,
    changed_config,
    plan_changes,
)
from storylab.record.experiment_schema import Amendment, ExperimentRecord, Registration
from storylab.record.run import Run

# Changes that leave the verdicts as they are: the report says them all the same.
HARMLESS = {"hypothesis", "code", "record"}
TRAINED_AGAIN = "all runs were trained again (--fresh)"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


@dataclass(frozen=True)
class Progress:
    """How far the runs of an experiment are.

    Attributes:
        finished: runs that have ended.
        shared: of these, runs that another experiment lists.
        planned: all runs.
        differences: pairs of an arm's and the baseline's run that have both ended.
    """

    finished: int
    shared: int
    planned: int
    differences: int = 0


def register(plan: dict[str, Any], progress: Progress) -> Registration:
    """The registration of a plan, at this moment."""
    return Registration(
        sha256=hashlib.sha256(canonical(plan).encode()).hexdigest(),
        time=now(),
        runs_finished=progress.finished,
        runs_shared=progress.shared,
        runs_planned=progress.planned,
        differences_known=progress.differences,
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
    return [amendment(*change, progress) for change in plan_changes(current, plan)]


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
    # Runs of other experiments are harmless as long as no arm could be compared by them.
    if registered.runs_finished > registered.runs_shared or registered.differences_known:
        reasons.append(_registered_line(registered))
    reasons += [
        f"{TRAINED_AGAIN if change.what == 'runs' else f'{change.what} changed'} {_when(change)}"
        for change in record.amendments
        if _is_exploratory(change)
    ]
    return list(dict.fromkeys(reasons))


def reasons_of_runs(record: ExperimentRecord, pairs: Iterable[tuple[Run, Run]]) -> Iterator[str]:
    """A reason for doubt if runs of an arm and its baseline began before the plan was registered: runs that
    were elsewhere at that moment, say, so that the registration did not see them."""
    if record.registered is None or record.registered.differences_known:
        return
    registered = _moment(record.registered.time)
    early = sum(
        max(_moment(a.environment.started), _moment(b.environment.started)) < registered
        for a, b in pairs
    )
    if early:
        yield f"the runs of {plural(early, 'difference')} began before the plan was registered"


def _moment(text: str) -> datetime:
    """A recorded time; the latest one of all for a text that is none."""
    try:
        return datetime.strptime(text, TIME_FORMAT)
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)


def _is_exploratory(change: Amendment) -> bool:
    return change.runs_finished > 0 and change.what not in HARMLESS


def _registered_line(registered: Registration) -> str:
    finished, shared = registered.runs_finished, registered.runs_shared
    if not finished:
        return "registered before any run"
    line = f"registered after {finished} of {registered.runs_planned} runs had finished"
    if shared:
        some = "all" if shared == finished else str(shared)
        line += f", {some} of them for another experiment"
    if registered.differences_known:
        line += f", so that {plural(registered.differences_known, 'difference')} could be known"
    return line


def _when(change: Amendment) -> str:
    if not change.runs_finished:
        return "before any run had finished"
    return f"after {change.runs_finished} of {change.runs_planned} runs"


def _change_words(change: Amendment) -> str:
    what, before, after = change.what, change.before, change.after
    if what == "record":
        return f"the record was begun again ({before})"
    if what == "runs":
        return TRAINED_AGAIN
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
            name = qualified_name(arm, condition)
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
