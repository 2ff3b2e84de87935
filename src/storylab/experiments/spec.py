"""An experiment as data: a TOML file, read into resolved configs and checked before any time is spent.

docs/guide/experiments.md describes the keys. A scale (``[scales.NAME]``) overrides the keys above it;
every cell of an experiment is an arm under a condition, and is trained once for each seed.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

from storylab.config import (
    FIELDS,
    TrainConfig,
    at_most,
    check_seed,
    without_removed,
)
from storylab.data.prepare import PrepareConfig
from storylab.decode import is_unicode, shown
from storylab.errors import UserError
from storylab.experiments.experiment import (
    METRICS,
    MOST_SEEDS,
    Cell,
    Expectation,
    Experiment,
    Variance,
)
from storylab.experiments.factors import (
    allowed_fields,
    changed_fields,
    factor_fields,
    unexplained,
)
from storylab.experiments.looks import DEFAULT_LOOKS
from storylab.experiments.matching import equally_compiled, matched_cells
from storylab.experiments.tables import (
    as_flags,
    get_table,
    get_tables,
    get_typed,
    is_number,
    listed,
    require_known,
    respelled,
)
from storylab.files import read_text
from storylab.flags import default_for, parse, perhaps

TEXTS = ("title", "purpose", "hypothesis", "waits_for")
SCALED = (
    *("config", "data", "arms", "conditions", "baseline", "seeds", "looks", "variance", "margin"),
    *("note", "expect"),
)
KEYS = {*TEXTS, "factor", "scales", *SCALED}
FIRST_SEED = 1337
MOST_LOOKS = 20
ONLY_CONDITION = ""


def load_experiment(path: Path, scale: str | None = None) -> Experiment:
    """Read an experiment file at one of its scales.

    Raises:
        UserError: the file cannot be read, has an unknown key, or an arm changes nothing or more
            than the factor.
    """
    text = read_text(path)
    if not is_unicode(path.name):
        raise UserError(f"{path}: its name is not UTF-8: rename it")
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise UserError(f"{path} is not valid TOML: it is nested too deep") from error
    except ValueError as error:  # of a number of thousands of digits too
        raise UserError(f"{path} is not valid TOML: {error}") from error
    try:
        return _Reader(respelled(table), path, scale).experiment()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _Reader:
    """Turns a parsed file into an :class:`Experiment`, with errors that name the place."""

    def __init__(self, table: dict[str, Any], path: Path, scale: str | None) -> None:
        require_known(table, KEYS, "the file")
        scales = get_table(table, "scales")
        if scale is None:
            scale = next(iter(scales)) if len(scales) == 1 else ""
            if len(scales) > 1:
                scale = "laptop" if "laptop" in scales else next(iter(scales))
        elif scale not in scales:
            raise UserError(f"there is no scale '{scale}': it has {listed(scales) or 'none'}")
        if "/" in scale or "\0" in scale:
            raise UserError(
                f"scale {shown(scale)}: its name is part of a file's, so it can have no '/'"
            )
        chosen = get_table(scales, scale) if scale in scales else {}
        require_known(chosen, set(SCALED), f"scale '{scale}'")
        self.config = get_table(table, "config") | get_table(chosen, "config")
        self.table = table | chosen
        self.name, self.scale = path.stem, scale
        # For the command that repeats it; an absolute path is this machine's alone.
        file = path.name if path.is_absolute() else path.as_posix()
        self.file = file.encode("utf-8", "replace").decode()

    def experiment(self) -> Experiment:
        table = self.table
        texts = {key: get_typed(table, key, str, "") for key in (*TEXTS, "note")}
        for key in ("title", "purpose"):
            if not texts[key].strip():
                raise UserError(f"it needs a {key}: one line of text")
        arms, conditions = get_tables(table, "arms"), get_tables(table, "conditions")
        if not arms and not texts["waits_for"]:
            raise UserError("it needs [arms]: a table with the changed values of each arm")
        matched = tuple(name for name, values in conditions.items() if _matched(name, values))
        conditions = {
            name: {k: v for k, v in values.items() if k != "match"}
            for name, values in conditions.items()
        } or {ONLY_CONDITION: {}}
        baseline = get_typed(table, "baseline", str, next(iter(arms), ""))
        if arms and baseline not in arms:
            raise UserError(f"the baseline '{baseline}' is not one of the arms: {listed(arms)}")
        factor = get_typed(table, "factor", str, "")
        if len(arms) > 1 and not factor:
            raise UserError("it needs a factor, the one thing that its arms differ in")
        if factor:
            factor_fields(factor)
        experiment = Experiment(
            name=self.name,
            file=self.file,
            scale=self.scale,
            **texts,
            factor=factor,
            baseline=baseline,
            arms=tuple(arms),
            conditions=tuple(conditions),
            matched=matched,
            seeds=(seeds := _seeds(table)),
            looks=_looks(table, len(seeds)),
            variance=_variance(table),
            stage="search",
            margin=_margin(table),
            expectations=tuple(_expectations(table, arms, conditions, baseline)),
            data=self.data,
            cells=(),
        )
        # Check the shared config first, so that its errors name [config] and not the first arm.
        self._config({}, "[config]")
        for name, values in conditions.items():
            self._config(values, f"condition '{name}'")
            if factor and factor_fields(factor) & values.keys():
                raise UserError(
                    f"condition '{name}' sets {listed(factor_fields(factor) & values.keys())}, which is "
                    "for the arms: it is the factor"
                )
        cells = [
            Cell(condition, arm, self._config(values | arms[arm], f"arm '{arm}'"))
            for condition, values in conditions.items()
            for arm in arms
        ]
        experiment = dataclasses.replace(experiment, cells=tuple(cells))
        experiment = dataclasses.replace(experiment, cells=tuple(matched_cells(experiment)))
        experiment = dataclasses.replace(experiment, cells=tuple(equally_compiled(experiment)))
        _check_arms(experiment)
        return experiment

    @cached_property
    def data(self) -> PrepareConfig:
        """The data set that ``[data]`` describes."""
        values = get_table(self.table, "data")
        allowed = {"source", "tokenizer", "builtin_stories", "train", "validation", "out"}
        require_known(values, allowed, "[data]")
        config = parse(PrepareConfig, as_flags(values), "", advice="in [data]")
        if not re.fullmatch(r"gpt2|bpe:[0-9]{1,9}", config.tokenizer):
            raise UserError(
                f"unknown tokenizer '{config.tokenizer}': use gpt2, or bpe:N such as bpe:4096; in [data]"
            )
        return config

    def _config(self, changes: Mapping[str, Any], place: str) -> TrainConfig:
        try:
            values = without_removed(self.config | dict(changes))
        except UserError as error:
            raise UserError(f"{error}; in {place}") from error
        for name in sorted(values.keys() & FIELDS.keys()):
            if instead := FIELDS[name].set_by:
                raise UserError(f"{place}: {name} is not an arm's to set: {instead}")
        for name in sorted(values.keys() - FIELDS.keys()):
            hint = perhaps(name, FIELDS) or "; storylab train --help lists the flags"
            raise UserError(f"unknown key '{name}'{hint}; in {place}")
        flags = as_flags({"data_dir": str(self.data.folder)} | values)
        config = parse(TrainConfig, flags, "", default_for(flags), advice=f"in {place}")
        config.require_no_rise()
        return config


def _check_arms(experiment: Experiment) -> None:
    """Every arm differs from the others in the factor, and in nothing else."""
    for i, condition in enumerate(experiment.conditions):
        for other in experiment.conditions[:i]:
            if (condition in experiment.matched) == (other in experiment.matched) and all(
                experiment.cell(condition, arm).config == experiment.cell(other, arm).config
                for arm in experiment.arms
            ):
                raise UserError(f"conditions '{other}' and '{condition}' are the same")
    if len(experiment.arms) < 2:
        return
    for condition in experiment.conditions:
        allowed = allowed_fields(experiment.factor, condition in experiment.matched)
        where = f" under '{condition}'" if condition else ""
        for i, arm in enumerate(experiment.arms):
            for other in experiment.arms[:i]:
                a, b = (experiment.cell(condition, name).config for name in (other, arm))
                if not changed_fields(a, b):
                    raise UserError(
                        f"arm '{arm}' changes nothing{where}: it has the same result as '{other}'"
                    )
                if extra := set(unexplained(a, b, allowed)):
                    raise UserError(
                        f"arm '{arm}' changes {listed(extra)}{where} besides the factor "
                        f"'{experiment.factor}': one factor at a time, or name a factor that "
                        "covers it"
                    )


def _expectations(
    table: dict[str, Any], arms: Iterable[str], conditions: Iterable[str], baseline: str
) -> Iterable[Expectation]:
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


def _seeds(table: dict[str, Any]) -> tuple[int, ...]:
    """The seeds; by default as many as the first look needs."""
    looks = _looks(table, None)
    seeds = get_typed(table, "seeds", list, list(range(FIRST_SEED, FIRST_SEED + looks[0])))
    if not seeds or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise UserError("seeds must be a list of whole numbers, such as [1337, 1338, 1339]")
    if len(set(seeds)) != len(seeds):
        raise UserError("seeds has a number twice: a seed counts once")
    for seed in seeds:
        check_seed("seed", seed)
    return tuple(seeds)


def _looks(table: dict[str, Any], seeds: int | None) -> tuple[int, ...]:
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


def _variance(table: dict[str, Any]) -> Variance:
    variance = get_typed(table, "variance", str, "moderated")
    if variance not in (known := get_args(Variance)):
        raise UserError(f"there is no variance '{variance}': use {listed(known)}")
    return cast("Variance", variance)


def _margin(table: dict[str, Any]) -> float | None:
    margin = table.get("margin")
    if margin is None:
        return None
    if not is_number(margin) or not margin > 0:
        raise UserError(
            "margin must be a finite number above 0: the loss in nats that counts as equal"
        )
    return float(margin)


def _matched(name: str, values: dict[str, Any]) -> bool:
    if values.get("match", "tokens") not in ("tokens", "compute"):
        raise UserError(f'condition \'{name}\': match must be "tokens" or "compute"')
    return values.get("match") == "compute"
