"""The identity of a run: its config as JSON, fields of other versions, differences and digests.

Which fields count is derived from their marks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from storylab.config.marks import ALWAYS, Effect, Group, Marks, marks_of
from storylab.config.model import ModelConfig
from storylab.config.train import NATIVE_DTYPES, TrainConfig
from storylab.decode import convert, is_unicode, shown
from storylab.errors import UserError

# The marks of every field by its name; a name belongs to one of the two configs only.
FIELDS: dict[str, Marks] = {**marks_of(TrainConfig), **marks_of(ModelConfig)}
# The current names of renamed fields by their former ones.
FORMER_NAMES = {marks.formerly: name for name, marks in FIELDS.items() if marks.formerly}


def fields_of(*groups: Group) -> frozenset[str]:
    """Names of the fields that belong to any of ``groups``."""
    return frozenset(name for name, marks in FIELDS.items() if marks.groups & set(groups))


def fields_that_change(effect: Effect) -> frozenset[str]:
    """Names of the fields that have an effect."""
    return frozenset(name for name, marks in FIELDS.items() if marks.effect == effect)


def _added(kind: type[ModelConfig] | type[TrainConfig]) -> dict[str, Any]:
    """Fields that the first runs did not have, each with the value that describes those runs."""
    found = {name: marks.before for name, marks in marks_of(kind).items()}
    return {name: before for name, before in found.items() if before is not ALWAYS}


PRESENTATION_FIELDS = fields_that_change("presentation")
SEED_FIELDS = fields_of("seed")
# The size of micro-batches changes memory and speed, and no tokens.
SPLIT_FIELDS = fields_of("batch")
ADDED_FIELDS, ADDED_MODEL_FIELDS = _added(TrainConfig), _added(ModelConfig)
# Fields that storylab once had, each with the value that changed nothing, and removed values of a field
# that remains: docs/time-to-loss.md has the measurements.
REMOVED_FIELDS: dict[str, Any] = {
    "cautious_decay": False,
    "short_share": 0.0,
    "zero_init": False,
    "softcap": 0.0,
    "embedding_norm": False,
    "bigram_rows": 0,
}
REMOVED_VALUES = {"value_residual": "token_table"}
LAST_WITH_REMOVED = "commit e30b07b"


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON values; the inverse of :func:`from_dict`."""
    values = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Rebuild a config that :func:`to_dict` made.

    Raises:
        UserError: a field is unknown, missing or of another type, for instance in a run of another
            version.
    """
    if not isinstance(values, dict) or not isinstance(values.get("model", {}), dict):
        raise UserError("the run's config is damaged: it or its model is not an object")
    values = without_removed(with_current_names(values))
    if "model" in values:
        values["model"] = without_removed(with_current_names(values["model"], "model."), "model.")
    names, given = {f.name for f in dataclasses.fields(TrainConfig)}, values.keys()
    values = ADDED_FIELDS | values
    if "backend" not in given and values.get("dtype") not in NATIVE_DTYPES:
        values["backend"] = "emulated"  # before there was a choice
    odd = set(values) ^ names
    if not odd:
        model = ADDED_MODEL_FIELDS | values["model"]
        odd = {
            f"model.{name}"
            for name in set(model) ^ {f.name for f in dataclasses.fields(ModelConfig)}
        }
    if odd:
        raise UserError(
            f"the run's config does not fit this version of storylab (fields: {', '.join(sorted(odd))})"
        )
    for name, value in (values | model).items():
        # Names of folders alone may have bytes that are not Unicode.
        if name not in ("data_dir", "out_dir") and isinstance(value, str) and not is_unicode(value):
            raise UserError(f"the run's config is damaged: {name}: is not Unicode text")
    values["out_dir"] = values["out_dir"] or None
    return convert(TrainConfig, values | {"model": model}, "the run's config")


def current_name(name: str) -> str:
    """The current name of a field that had ``name`` in an earlier version; any other name as it is."""
    return FORMER_NAMES.get(name, name)


def with_current_names(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """``values`` by the current names of their fields.

    Raises:
        UserError: a field has two values, by its former and by its current name; the message begins with
            ``path`` and the current name.
    """
    for former, name in FORMER_NAMES.items():
        if former in values and name in values:
            raise UserError(f"{path}{name} is given twice, as {former} and as {name}")
    return {current_name(name): value for name, value in values.items()}


def without_removed(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """``values`` of fields by name, without those that storylab once had, where they change nothing.

    Raises:
        UserError: one of them changes something; the message begins with ``path`` and its name.
    """
    for name, value in values.items():
        neutral = name not in REMOVED_FIELDS or value == REMOVED_FIELDS[name]
        if not neutral or (name in REMOVED_VALUES and value == REMOVED_VALUES[name]):
            raise UserError(
                f"{path}{name} is {shown(value)}, which this version of storylab cannot do: "
                f"{LAST_WITH_REMOVED} is the last that could (docs/time-to-loss.md says why it was removed)"
            )
    return {name: value for name, value in values.items() if name not in REMOVED_FIELDS}


def flat(config: TrainConfig, without: Collection[str] = ()) -> dict[str, Any]:
    """The config's JSON values by the name of their field, those of the model last; some left out."""
    values = to_dict(config)
    values.update(values.pop("model"))
    return {name: value for name, value in values.items() if name not in without}


def differences(a: TrainConfig, b: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that decide the result and differ between ``a`` and ``b``, as name -> (a's, b's)."""
    left, right = (
        flat(config, PRESENTATION_FIELDS) | {"data_seed": config.resolved_data_seed}
        for config in (a, b)
    )
    return {name: (left[name], right[name]) for name in left if left[name] != right[name]}


def recipe_digest(config: TrainConfig, fingerprint: str) -> str:
    """Ten hexadecimal digits that identify a run's computation, without its seeds: its resolved
    config and its data.

    The size of micro-batches is left out, so that a run that needed smaller ones to fit into memory
    still counts as the planned run. So that a run keeps its digest, a field that the first runs did not
    have is left out if it has its value of then, and a renamed field counts by its former name.
    """
    values = to_dict(config)
    for name in PRESENTATION_FIELDS | SEED_FIELDS | SPLIT_FIELDS:
        del values[name]
    for fields, added in ((values, ADDED_FIELDS), (values["model"], ADDED_MODEL_FIELDS)):
        for name, before in added.items():
            if fields.get(name) == before:
                del fields[name]
        for former, name in FORMER_NAMES.items():
            if name in fields:
                fields[former] = fields.pop(name)
    values["sequences"] = config.batch_size * config.gradient_accumulation_steps
    text = json.dumps([values, fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def timing_key(config: TrainConfig) -> str:
    """Join the fields that change a step's time or memory. Runs with the same key share a calibration."""
    values = flat(config, PRESENTATION_FIELDS | fields_that_change("result"))
    values["gradient_accumulation_steps"] = config.gradient_accumulation_steps > 1
    values["ema_fraction"] = config.ema_fraction > 0
    return json.dumps(values)
