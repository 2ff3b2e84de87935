"""The plan of an experiment as plain values, and the differences between two of them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from storylab.config import TrainConfig, current_name, from_dict, to_dict
from storylab.errors import UserError
from storylab.experiments.experiment import Cell, Experiment, counted_up
from storylab.experiments.factors import changed_fields
from storylab.record.experiment_schema import Amendment, Registration
from storylab.record.provenance import code_sha256, representative

# Fields of a config that a plan leaves out: seeds have a key of their own, folders are a machine's.
NOT_PLANNED = ("seed", "data_seed", "data_dir", "out_dir")
Arms = dict[str, dict[str, Any]]
"""Configs by condition and arm."""


def plan_of(experiment: Experiment, cells: Iterable[Cell], fingerprint: str) -> dict[str, Any]:
    """The plan of an experiment as plain JSON values: all that a verdict rests on, besides the runs.

    Args:
        experiment: all of it.
        cells: its cells with device and data filled in.
        fingerprint: of the data set.
    """
    arms: Arms = {}
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
        "factorial": dataclasses.asdict(experiment.factorial) if experiment.factorial else None,
        "data": fingerprint,
        "code": code_sha256(),
    }
    plain: dict[str, Any] = json.loads(canonical(plan))
    return plain


def canonical(plan: dict[str, Any]) -> str:
    """The one text of a plan as JSON, of which the SHA-256 is taken."""
    return json.dumps(plan, sort_keys=True, separators=(",", ":"), allow_nan=False)


def plan_changes(current: dict[str, Any], plan: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys of ``plan`` that differ from ``current``, with both values; of arms only those that differ."""
    for key, value in plan.items():
        before = current.get(key)
        if key == "arms":
            before, value = _changed_arms(before or {}, value)
        if not _is_same(key, before, value):
            yield key, before, value


def amended_plan(registered: Registration, earlier: Iterable[Amendment]) -> dict[str, Any]:
    """The plan that holds after the amendments, with the current names of config fields as its factors."""
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
    if plan.get("factor"):
        plan["factor"] = current_name(plan["factor"])
    if plan.get("factorial"):
        for factor in plan["factorial"]["factors"]:
            factor["fields"] = sorted(map(current_name, factor["fields"]))
    return plan


def _is_same(key: str, before: Any, after: Any) -> bool:
    if key == "code" and isinstance(before, str):
        return representative(before) == representative(after)
    if key == "seeds" and before:
        # The list goes on by counting up, so that more of the same seeds are no change.
        count = max(len(before), len(after))
        return counted_up(before, count) == counted_up(after, count)
    return bool(before == after)


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
        before, after = (
            {current_name(name): value for name, value in values.items()}
            for values in (before, after)
        )
        names = {**before, **after}
        pairs = {name: (before.get(name), after.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _parsed(values: dict[str, Any]) -> TrainConfig:
    default = to_dict(TrainConfig())
    return from_dict({name: default[name] for name in NOT_PLANNED} | values)
