"""An experiment as data: a TOML file, read into resolved configs and checked before any time is spent.

docs/guide/experiments.md describes the keys. A scale (``[scales.NAME]``) overrides the keys above it;
every cell of an experiment is an arm under a condition, and is trained once for each seed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from storylab.config import (
    FIELDS,
    GPT2_VOCAB_SIZE,
    WIDE_DTYPES,
    TrainConfig,
    at_most,
    check_seed,
    without_removed,
)
from storylab.data.prepare import PrepareConfig
from storylab.decode import is_unicode, shown
from storylab.errors import UserError
from storylab.experiments.factors import (
    FACTORS,
    allowed_fields,
    changed_fields,
    factor_fields,
    unexplained,
)
from storylab.files import read_text
from storylab.flags import default_for, parse, perhaps
from storylab.model.cost import training_flops
from storylab.training.compile_policy import worth_compiling

TEXTS = ("title", "purpose", "hypothesis", "waits_for")
SCALED = ("config", "data", "arms", "conditions", "baseline", "seeds", "margin", "note", "expect")
KEYS = {*TEXTS, "factor", "scales", *SCALED}
METRICS = {
    "loss_difference": "val loss minus the baseline's, in nats",
    "speed_ratio": "tokens a second over the baseline's",
    "memory_ratio": "peak memory over the baseline's",
    "tokens_per_second": "tokens a second",
    "val_loss": "loss on the whole validation split, in nats",
    "plateau_iteration": "predicted iteration from which a doubling brings less than 0.01 nats",
}
DEFAULT_SEEDS = (1337, 1338, 1339)
MOST_SEEDS = 10_000
ONLY_CONDITION = ""
KINDS: dict[type, str] = {str: "text", list: "a list [...]", dict: "a table {...}"}
# Keys of [data] that hold lists.
LISTS = ("train", "validation")


@dataclass(frozen=True)
class Expectation:
    """A number that the hypothesis names, to be held against the measured one."""

    text: str
    metric: str
    arm: str
    at_least: float | None = None
    at_most: float | None = None
    condition: str | None = None


@dataclass(frozen=True)
class Cell:
    """An arm under a condition, with the config of its runs but for the seed."""

    condition: str
    arm: str
    config: TrainConfig


@dataclass(frozen=True)
class Experiment:
    """A checked experiment at one scale.

    ``conditions`` are compared apart, each with a baseline of its own; an experiment without
    conditions has the one named ``""``. ``matched`` names those conditions whose arms have the
    baseline's training compute instead of its number of tokens.
    """

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
    arms: tuple[str, ...]
    conditions: tuple[str, ...]
    matched: tuple[str, ...]
    seeds: tuple[int, ...]
    margin: float | None
    expectations: tuple[Expectation, ...]
    data: PrepareConfig
    cells: tuple[Cell, ...]

    @property
    def label(self) -> str:
        """Name of the experiment and its scale, fit for a file name."""
        return f"{self.name}-{self.scale}" if self.scale else self.name

    def first_seeds(self, count: int | None) -> tuple[int, ...]:
        """The first ``count`` seeds of the file, or as many as it has; more count up from the last.

        Raises:
            UserError: ``count`` is below 1, or more than anyone can train.
        """
        if count is None:
            return self.seeds
        if count < 1:
            raise UserError(f"seeds is {count}: it must be at least 1")
        at_most(MOST_SEEDS, "seeds", count)
        more = range(max(self.seeds) + 1, max(self.seeds) + 1 + count - len(self.seeds))
        return (*self.seeds, *more)[:count]

    @property
    def vocab_size(self) -> int:
        """Token ids of the data set that the file describes."""
        kind, _, size = self.data.tokenizer.partition(":")
        return int(size) if kind == "bpe" else GPT2_VOCAB_SIZE

    def cell(self, condition: str, arm: str) -> Cell:
        """The cell of an arm under a condition."""
        return next(c for c in self.cells if (c.condition, c.arm) == (condition, arm))


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
        return _Reader(_respelled(table), path, scale).experiment()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _respelled(table: dict[str, Any], place: str = "the file") -> dict[str, Any]:
    """The file, or one of its scales, with underscores in every key that is not a name of the user's: a
    hyphen is another spelling of it, as it is in flags.

    Raises:
        UserError: a key is given in both spellings.
    """
    table = _one_spelling(table, place)
    for key in ("config", "data"):
        if key in table:
            table[key] = _one_spelling(table[key], f"[{key}]")
    for key, kind in (("arms", "arm"), ("conditions", "condition")):
        if isinstance(table.get(key), dict):
            table[key] = {
                name: _one_spelling(values, f"{kind} '{name}'")
                for name, values in table[key].items()
            }
    if isinstance(table.get("expect"), list):
        table["expect"] = [_one_spelling(entry, "[[expect]]") for entry in table["expect"]]
    if isinstance(table.get("scales"), dict):
        table["scales"] = {
            name: _respelled(values, f"scale '{name}'") if isinstance(values, dict) else values
            for name, values in table["scales"].items()
        }
    return table


def _one_spelling(table: Any, place: str) -> Any:
    """A table's values by the spelling with underscores; what is no table is told of where it is read."""
    if not isinstance(table, dict):
        return table
    spelled: dict[str, Any] = {}
    given: dict[str, str] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in given:
            raise UserError(f"{name} is given twice in {place}, as {given[name]} and as {key}")
        given[name], spelled[name] = key, value
    return spelled


class _Reader:
    """Turns a parsed file into an :class:`Experiment`, with errors that name the place."""

    def __init__(self, table: dict[str, Any], path: Path, scale: str | None) -> None:
        _known(table, KEYS, "the file")
        scales = _table(table, "scales")
        if scale is None:
            scale = next(iter(scales)) if len(scales) == 1 else ""
            if len(scales) > 1:
                scale = "laptop" if "laptop" in scales else next(iter(scales))
        elif scale not in scales:
            raise UserError(f"there is no scale '{scale}': it has {_listed(scales) or 'none'}")
        if "/" in scale or "\0" in scale:
            raise UserError(
                f"scale {shown(scale)}: its name is part of a file's, so it can have no '/'"
            )
        chosen = _table(scales, scale) if scale in scales else {}
        _known(chosen, set(SCALED), f"scale '{scale}'")
        self.config = _table(table, "config") | _table(chosen, "config")
        self.table = table | chosen
        self.name, self.scale = path.stem, scale
        # For the command that repeats it; an absolute path is this machine's alone.
        file = path.name if path.is_absolute() else path.as_posix()
        self.file = file.encode("utf-8", "replace").decode()

    def experiment(self) -> Experiment:
        table = self.table
        texts = {key: _typed(table, key, str, "") for key in (*TEXTS, "note")}
        for key in ("title", "purpose"):
            if not texts[key].strip():
                raise UserError(f"it needs a {key}: one line of text")
        arms, conditions = _tables(table, "arms"), _tables(table, "conditions")
        if not arms and not texts["waits_for"]:
            raise UserError("it needs [arms]: a table with the changed values of each arm")
        matched = tuple(name for name, values in conditions.items() if _matched(name, values))
        conditions = {
            name: {k: v for k, v in values.items() if k != "match"}
            for name, values in conditions.items()
        } or {ONLY_CONDITION: {}}
        baseline = _typed(table, "baseline", str, next(iter(arms), ""))
        if arms and baseline not in arms:
            raise UserError(f"the baseline '{baseline}' is not one of the arms: {_listed(arms)}")
        factor = _typed(table, "factor", str, "")
        if len(arms) > 1 and not factor:
            raise UserError("it needs a factor: what its arms differ in")
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
            seeds=_seeds(table),
            margin=_margin(table),
            expectations=tuple(_expectations(table, arms, conditions, baseline)),
            data=self.data,
            cells=(),
        )
        # What is wrong in what all arms share is told of there.
        self._config({}, "[config]")
        for name, values in conditions.items():
            self._config(values, f"condition '{name}'")
            if factor and factor_fields(factor) & values.keys():
                raise UserError(
                    f"condition '{name}' sets {_listed(factor_fields(factor) & values.keys())}, which is "
                    "for the arms: it is what they differ in"
                )
        cells = [
            Cell(condition, arm, self._config(values | arms[arm], f"arm '{arm}'"))
            for condition, values in conditions.items()
            for arm in arms
        ]
        experiment = dataclasses.replace(experiment, cells=tuple(cells))
        experiment = dataclasses.replace(experiment, cells=tuple(_matched_cells(experiment)))
        experiment = dataclasses.replace(experiment, cells=tuple(_alike_compiled(experiment)))
        _check_arms(experiment)
        return experiment

    @cached_property
    def data(self) -> PrepareConfig:
        """The data set that ``[data]`` describes."""
        values = _table(self.table, "data")
        allowed = {"source", "tokenizer", "builtin_stories", "train", "validation", "out"}
        _known(values, allowed, "[data]")
        config = parse(PrepareConfig, _flags(values), "", advice="in [data]")
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
            hint = perhaps(name, FIELDS) or "; see storylab train --help for what there is"
            raise UserError(f"unknown key '{name}'{hint}; in {place}")
        flags = _flags({"data_dir": str(self.data.folder)} | values)
        config = parse(TrainConfig, flags, "", default_for(flags), advice=f"in {place}")
        config.require_no_rise()
        return config


def _matched_cells(experiment: Experiment) -> Iterable[Cell]:
    """The cells, those of a matched condition as long as the baseline's compute lasts."""
    for cell in experiment.cells:
        if cell.condition not in experiment.matched or cell.arm == experiment.baseline:
            yield cell
            continue
        base = experiment.cell(cell.condition, experiment.baseline).config
        vocab_size = experiment.vocab_size
        ratio = _flops(base, vocab_size) / _flops(cell.config, vocab_size)
        ratio *= base.tokens_per_iteration / cell.config.tokens_per_iteration
        updates = max(1, round(base.iterations * ratio))
        stretch = (updates - 1) / max(base.max_iters, 1)
        warmup = round(cell.config.warmup_iters * stretch)
        config = dataclasses.replace(cell.config, max_iters=updates - 1, warmup_iters=warmup)
        yield dataclasses.replace(cell, config=config)


def _alike_compiled(experiment: Experiment) -> Iterable[Cell]:
    """The cells, uncompiled where nothing else is said and one of them could not be compiled or is too
    short for it: arms must not differ in that."""
    short = any(
        cell.config.dtype not in WIDE_DTYPES or not worth_compiling(cell.config)
        for cell in experiment.cells
    )
    for cell in experiment.cells:
        if short and cell.config.compile is None:
            cell = dataclasses.replace(cell, config=dataclasses.replace(cell.config, compile=False))
        yield cell


def _flops(config: TrainConfig, vocab_size: int) -> float:
    return training_flops(config.model, vocab_size, config.block_size)


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
                        f"arm '{arm}' changes nothing{where}: all that decides its result is as in "
                        f"'{other}'"
                    )
                if extra := set(unexplained(a, b, allowed)):
                    raise UserError(
                        f"arm '{arm}' changes {_listed(extra)}{where} besides the factor "
                        f"'{experiment.factor}': one factor at a time, or name a factor that "
                        "covers it"
                    )


def _expectations(
    table: dict[str, Any], arms: Iterable[str], conditions: Iterable[str], baseline: str
) -> Iterable[Expectation]:
    entries = _typed(table, "expect", list, [])
    names = {f.name for f in dataclasses.fields(Expectation)}
    for entry in entries:
        if not isinstance(entry, dict):
            raise UserError("expect must be a list of tables: [[expect]]")
        _known(entry, names, "[[expect]]")
        missing = {"text", "metric", "arm"} - set(entry)
        if missing or not {"at_least", "at_most"} & set(entry):
            raise UserError("[[expect]] needs text, metric, arm, and at_least or at_most")
        for key, choices in (("metric", METRICS), ("arm", arms), ("condition", conditions)):
            if key in entry and (not isinstance(entry[key], str) or entry[key] not in choices):
                raise UserError(f"[[expect]] {key} '{entry[key]}': use one of {_listed(choices)}")
        relative = entry["metric"].endswith(("_difference", "_ratio"))
        if relative and entry["arm"] == baseline:
            raise UserError(
                f"[[expect]] {entry['metric']} of the baseline '{baseline}' says nothing"
            )
        for key in ("at_least", "at_most"):
            if not _is_number(entry.get(key, 0)):
                raise UserError(f"[[expect]] {key} must be a finite number")
        for key in ("text", "condition"):
            _typed(entry, key, str, "")
        yield Expectation(**entry)


def _seeds(table: dict[str, Any]) -> tuple[int, ...]:
    seeds = _typed(table, "seeds", list, list(DEFAULT_SEEDS))
    if not seeds or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise UserError("seeds must be a list of whole numbers, such as [1337, 1338, 1339]")
    if len(set(seeds)) != len(seeds):
        raise UserError("seeds has a number twice: a seed counts once")
    for seed in seeds:
        check_seed("seed", seed)
    return tuple(seeds)


def _margin(table: dict[str, Any]) -> float | None:
    margin = table.get("margin")
    if margin is None:
        return None
    if not _is_number(margin) or not margin > 0:
        raise UserError(
            "margin must be a finite number above 0: the loss in nats that counts as equal"
        )
    return float(margin)


def _is_number(value: Any) -> bool:
    """Whether a value of a file is a number that a float holds."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _matched(name: str, values: dict[str, Any]) -> bool:
    if values.get("match", "tokens") not in ("tokens", "compute"):
        raise UserError(f'condition \'{name}\': match must be "tokens" or "compute"')
    return values.get("match") == "compute"


def _flags(values: Mapping[str, Any]) -> list[str]:
    """A table as flags, so that a file and the command line are checked by the same parser."""
    flags = []
    for key, value in values.items():
        many = key in LISTS and isinstance(value, list)
        for entry in value if many else [value]:
            if not isinstance(entry, str if many else bool | str | int | float):
                kind = "a list of texts" if many else "a single value"
                raise UserError(f"{key} must be {kind}, not {shown(value)}")
            if isinstance(entry, str) and ("\0" in entry or (many and entry.startswith("-"))):
                raise UserError(f"{key} cannot be {shown(entry)}")
        # With "=" a value that looks like a flag is none.
        flags += [f"--{key}", *value] if many else [f"--{key}={value}"]
    return flags


def _known(table: Mapping[str, Any], keys: set[str], place: str) -> None:
    for key in table:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f"perhaps you meant '{close[0]}'" if close else f"use {_listed(keys)}"
            raise UserError(f"unknown key '{key}' in {place}: {hint}")


def _typed(table: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind):
        raise UserError(f"{key} must be {KINDS[kind]}, not {shown(value)}")
    return value


def _table(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    value: dict[str, Any] = _typed(table, key, dict, {})
    return value


def _tables(table: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    value = _table(table, key)
    for name in value:
        _table(value, name)
    return value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names) if isinstance(names, set | frozenset) else names)


SKELETON = """\
title = {title}
purpose = "What do you want to know?"
factor = "learning_rate"          # a field of `storylab train --help`, or: {factors}
baseline = "1e-3"
seeds = [1337, 1338, 1339]        # each seed is one pair of runs: same weights, same data order

[data]
source = "builtin"                # tinystories, or builtin to try this without a download
tokenizer = "bpe:1024"

[config]                          # shared by all arms; what is not here is the record's
preset = "nano"
max_iters = 300
batch_size = 32
gradient_accumulation_steps = 1
warmup_iters = 30
learning_rate = 1e-3
min_lr = 0.0
eval_interval = 50
eval_iters = 2

[arms]                            # each arm states what it changes
"1e-3" = {{ learning_rate = 1e-3 }}
"3e-3" = {{ learning_rate = 3e-3 }}
"""


def skeleton(title: str) -> str:
    """The text of a new experiment file, which runs as it is.

    Raises:
        UserError: no file can have the title.
    """
    if not title.strip():
        raise UserError("the title is empty: give a line of text")
    if not is_unicode(title):
        raise UserError("the title is not UTF-8 text: write it anew")
    # A JSON string is a TOML string, but for the one control character that JSON leaves as it is.
    quoted = json.dumps(title, ensure_ascii=False).replace("\x7f", "\\u007f")
    return SKELETON.format(title=quoted, factors=", ".join(FACTORS))
