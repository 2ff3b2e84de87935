"""An experiment as data: a TOML file, read into resolved configs and checked before any time is spent.

docs/guide/experiments.md describes the keys. A scale (``[scales.NAME]``) overrides the keys above it;
every cell of an experiment is an arm under a condition, and is trained once for each seed.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from storylab.config import FIELDS, TrainConfig, current_name, without_removed
from storylab.data.prepare_config import PrepareConfig
from storylab.decode import is_unicode, shown
from storylab.errors import UserError
from storylab.experiments.experiment import Cell, Experiment
from storylab.experiments.factorial import Factorial, fields_between
from storylab.experiments.factors import changed_fields, factor_fields, unexplained
from storylab.experiments.matching import equally_compiled, matched_cells
from storylab.experiments.spec_factors import check_levels, read_factorial
from storylab.experiments.spec_values import (
    read_expectations,
    read_looks,
    read_margin,
    read_matched,
    read_seeds,
    read_variance,
)
from storylab.experiments.tables import (
    as_flags,
    get_table,
    get_tables,
    get_typed,
    listed,
    require_known,
    respelled,
)
from storylab.files import read_text
from storylab.flags import default_for, parse, perhaps

TEXTS = ("title", "purpose", "hypothesis", "waits_for")
SCALED = (
    *("config", "data", "arms", "conditions", "baseline", "seeds", "looks", "variance", "margin"),
    *("note", "expect", "factors", "fraction"),
)
KEYS = {*TEXTS, "factor", "scales", *SCALED}
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
        """The experiment, with all its cells, checked."""
        factorial, arms = read_factorial(self.table)
        experiment, conditions = self._without_cells(arms, factorial)
        # Check the shared config first, so that its errors name [config] and not the first arm.
        self._config({}, "[config]")
        for name, values in conditions.items():
            self._config(values, f"condition '{name}'")
            if taken := _factor_fields(experiment) & values.keys():
                raise UserError(
                    f"condition '{name}' sets {listed(taken)}, which is for the arms: it is the factor"
                )
            if factorial:
                check_levels(factorial, arms, values, self._config)
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

    def _without_cells(
        self, arms: dict[str, dict[str, Any]], factorial: Factorial | None
    ) -> tuple[Experiment, dict[str, dict[str, Any]]]:
        """The experiment without its cells, and the settings of every condition."""
        table, texts = self.table, self._texts()
        if not arms and not texts["waits_for"]:
            raise UserError(
                "it needs [arms]: a table with the changed values of each arm; or [factors]"
            )
        conditions = get_tables(table, "conditions")
        matched = tuple(name for name, values in conditions.items() if read_matched(name, values))
        conditions = {
            name: {k: v for k, v in values.items() if k != "match"}
            for name, values in conditions.items()
        } or {ONLY_CONDITION: {}}
        factor, baseline = ("", next(iter(arms))) if factorial else self._factor_and_baseline(arms)
        seeds = read_seeds(table)
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
            seeds=seeds,
            looks=read_looks(table, len(seeds)),
            variance=read_variance(table),
            stage="search",
            margin=read_margin(table),
            expectations=tuple(read_expectations(table, arms, conditions, baseline)),
            data=self.data,
            cells=(),
            factorial=factorial,
        )
        return experiment, conditions

    def _texts(self) -> dict[str, str]:
        texts = {key: get_typed(self.table, key, str, "") for key in (*TEXTS, "note")}
        for key in ("title", "purpose"):
            if not texts[key].strip():
                raise UserError(f"it needs a {key}: one line of text")
        return texts

    def _factor_and_baseline(self, arms: dict[str, dict[str, Any]]) -> tuple[str, str]:
        baseline = get_typed(self.table, "baseline", str, next(iter(arms), ""))
        if arms and baseline not in arms:
            raise UserError(f"the baseline '{baseline}' is not one of the arms: {listed(arms)}")
        factor = current_name(get_typed(self.table, "factor", str, ""))
        if len(arms) > 1 and not factor:
            raise UserError("it needs a factor, the one thing that its arms differ in")
        if factor:
            factor_fields(factor)
        return factor, baseline

    @cached_property
    def data(self) -> PrepareConfig:
        """The data set that ``[data]`` describes."""
        values = get_table(self.table, "data")
        allowed = {"source", "tokenizer", "builtin_stories", "train", "validation", "test", "out"}
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


def _factor_fields(experiment: Experiment) -> frozenset[str]:
    """The fields that arms may change, which no condition may."""
    if experiment.factorial:
        return frozenset(name for factor in experiment.factorial.factors for name in factor.fields)
    return factor_fields(experiment.factor) if experiment.factor else frozenset()


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
        where = f" under '{condition}'" if condition else ""
        for i, arm in enumerate(experiment.arms):
            for other in experiment.arms[:i]:
                a, b = (experiment.cell(condition, name).config for name in (other, arm))
                allowed = fields_between(
                    experiment.factorial,
                    experiment.factor,
                    experiment.arms,
                    (other, arm),
                    condition in experiment.matched,
                )
                if not changed_fields(a, b):
                    raise UserError(
                        f"arm '{arm}' changes nothing{where}: it has the same result as '{other}'"
                    )
                if extra := set(unexplained(a, b, allowed)):
                    if experiment.factorial:
                        raise UserError(
                            f"'{arm}' differs from '{other}' in {listed(extra)}{where}, which none of "
                            "their factors changes"
                        )
                    raise UserError(
                        f"arm '{arm}' changes {listed(extra)}{where} besides the factor "
                        f"'{experiment.factor}': one factor at a time, or name a factor that "
                        "covers it"
                    )
