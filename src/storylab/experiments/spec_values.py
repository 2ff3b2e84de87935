"""Read the values of an experiment file that are its alone: seeds, looks, margin, expectations.

Every function raises a UserError that names the key if its value cannot be used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, cast, get_args

from storylab.config import at_most, check_seed
from storylab.errors import UserError
from storylab.experiments.experiment import METRICS, MOST_SEEDS, Expectation, Variance
from storylab.experiments.looks import DEFAULT_LOOKS
from storylab.experiments.tables import get_typed, is_number, listed, require_known

FIRST_SEED = 1337
MOST_LOOKS = 20


def read_expectations(
    table: dict[str, Any], arms: Iterable[str], conditions: Iterable[str], baseline: str
) -> Iterable[Expectation]:
    """The expectations of ``[[expect]]``."""
    entries = get_typed(table, "expect", list, [])
    names = {f.name for f in dataclasses.fields(Expectation)}
    for entry in entries:
        if not isinstance(entry, dict):
            raise UserError("expect must be a list of tables: [[expect]]")
        require_known(entry, names, "[[expect]]")
        missing = {"text", "metric", "arm"} - set(entry)
        if missing or not {"at_least", "at_most"} & set(entry):
            raise UserError("[[expect]] needs text, metric, arm, and at_least or at_most")
        for key, choices in (("metric", METRICS), ("arm", arms), ("condition", conditions)):
            if key in entry and (not isinstance(entry[key], str) or entry[key] not in choices):
                raise UserError(f"[[expect]] {key} '{entry[key]}': use one of {listed(choices)}")
        relative = entry["metric"].endswith(("_difference", "_ratio"))
        if relative and entry["arm"] == baseline:
            raise UserError(
                f"[[expect]] {entry['metric']} of the baseline '{baseline}' says nothing"
            )
        for key in ("at_least", "at_most"):
            if not is_number(entry.get(key, 0)):
                raise UserError(f"[[expect]] {key} must be a finite number")
        for key in ("text", "condition"):
            get_typed(entry, key, str, "")
        yield Expectation(**entry)


def read_seeds(table: dict[str, Any]) -> tuple[int, ...]:
    """The seeds; by default as many as the first look needs."""
    looks = read_looks(table, None)
    seeds = get_typed(table, "seeds", list, list(range(FIRST_SEED, FIRST_SEED + looks[0])))
    if not seeds or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise UserError("seeds must be a list of whole numbers, such as [1337, 1338, 1339]")
    if len(set(seeds)) != len(seeds):
        raise UserError("seeds has a number twice: a seed counts once")
    for seed in seeds:
        check_seed("seed", seed)
    return tuple(seeds)


def read_looks(table: dict[str, Any], seeds: int | None) -> tuple[int, ...]:
    """The planned looks; by default 3, 5 and 8 seeds, or the one at all ``seeds`` if a file lists
    another number."""
    default = DEFAULT_LOOKS if seeds is None or seeds in DEFAULT_LOOKS else (seeds,)
    looks = get_typed(table, "looks", list, list(default))
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in looks)
    if not looks or not whole or looks != sorted(set(looks)) or looks[0] < 1:
        raise UserError("looks must be a list of growing numbers of seeds, such as [3, 5, 8]")
    at_most(MOST_SEEDS, "looks", looks[-1])
    if len(looks) > MOST_LOOKS:
        raise UserError(f"looks has {len(looks)} numbers: it can have {MOST_LOOKS}")
    return tuple(looks)


def read_variance(table: dict[str, Any]) -> Variance:
    """How noise is estimated; moderated by default."""
    variance = get_typed(table, "variance", str, "moderated")
    if variance not in (known := get_args(Variance)):
        raise UserError(f"there is no variance '{variance}': use {listed(known)}")
    return cast("Variance", variance)


def read_margin(table: dict[str, Any]) -> float | None:
    """The margin in nats, if there is one."""
    margin = table.get("margin")
    if margin is None:
        return None
    if not is_number(margin) or not margin > 0:
        raise UserError(
            "margin must be a finite number above 0: the loss in nats that counts as equal"
        )
    return float(margin)


def read_matched(name: str, values: dict[str, Any]) -> bool:
    """Whether a condition gives its arms equal compute."""
    if values.get("match", "tokens") not in ("tokens", "compute"):
        raise UserError(f'condition \'{name}\': match must be "tokens" or "compute"')
    return values.get("match") == "compute"
