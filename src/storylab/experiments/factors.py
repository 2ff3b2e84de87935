"""The factors that an experiment may vary: the config fields of each, and the differences that count."""

from __future__ import annotations

import difflib
from typing import Any

from storylab.config import (
    FIELDS,
    FULL,
    PRESENTATION_FIELDS,
    SEED_FIELDS,
    SPLIT_FIELDS,
    AttentionPattern,
    TrainConfig,
    differences,
    fields_of,
)
from storylab.errors import UserError
from storylab.optim.schedule import learning_rate, telling_iterations

LENGTH_FIELDS = fields_of("length")
LEARNING_RATE_FIELDS = fields_of("schedule")
# A factor that takes several fields to say; every other factor is the one field of its name.
FACTORS: dict[str, frozenset[str]] = {
    "size": fields_of("preset", "size"),
    "length": LENGTH_FIELDS,
    "learning_rate": LEARNING_RATE_FIELDS,
    "batch": SPLIT_FIELDS,
    "precision": fields_of("precision"),
    "method": fields_of("schedule", "optimizer", "method"),
    "training": fields_of("schedule", "optimizer", "method", "batch", "length"),
}
# Fields that add or reshape weights: models that differ in them are expected to begin with other weights.
WEIGHT_FIELDS = frozenset(name for name, marks in FIELDS.items() if marks.weights)
# Whole recipes rather than single causes: an experiment has to name them, or the arms their method.
WHOLE_RECIPES = ("method", "training")


def qualified_name(name: str, condition: str) -> str:
    """An arm's name, or another text, followed by its condition, if any."""
    return f"{name} @ {condition}" if condition else name


def factor_fields(factor: str) -> frozenset[str]:
    """The config fields that a factor covers.

    Raises:
        UserError: there is no such factor or field.
    """
    names = FIELDS.keys() - SEED_FIELDS - PRESENTATION_FIELDS
    if factor in FACTORS:
        return FACTORS[factor]
    if factor in names:
        return frozenset({factor})
    known = sorted({*FACTORS, *names})
    close = difflib.get_close_matches(factor, known, n=2)
    hint = f"; perhaps you meant {' or '.join(close)}" if close else f": use {', '.join(known)}"
    raise UserError(f"there is no factor '{factor}'{hint}")


def allowed_fields(factor: str, matched: bool) -> frozenset[str]:
    """The config fields in which arms may differ: those of the factor, none without one, and the
    length too where arms are ``matched`` to equal compute.

    Raises:
        UserError: there is no such factor or field.
    """
    fields = factor_fields(factor) if factor else frozenset()
    return fields | LENGTH_FIELDS if matched else fields


def changed_fields(a: TrainConfig, b: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Fields in which two runs differ beyond their seeds, as name -> (a's, b's).

    Micro-batches of another size make no difference where the batch is the same.
    """
    changed = differences(a, b)
    if a.tokens_per_iteration == b.tokens_per_iteration and a.block_size == b.block_size:
        changed = {k: v for k, v in changed.items() if k not in SPLIT_FIELDS}
    if same_learning_rates(a, b):
        changed = {k: v for k, v in changed.items() if k not in FACTORS["learning_rate"]}
    if patterns_in_effect(a) == patterns_in_effect(b):
        changed.pop("attention", None)
    # Preset and method only name values: they do not count where those are the same.
    for name, fields in (("preset", FACTORS["size"]), ("method", FACTORS["method"])):
        if not set(changed) & (fields - {name}):
            changed.pop(name, None)
    return {k: v for k, v in changed.items() if k not in SEED_FIELDS}


def unexplained(
    a: TrainConfig, b: TrainConfig, allowed: frozenset[str]
) -> dict[str, tuple[Any, Any]]:
    """Fields, except the ``allowed`` ones, in which two runs differ, as name -> (a's, b's).

    A change of block_size may change the number of sequences in a batch, but not its number of tokens.
    """
    changed = {k: v for k, v in changed_fields(a, b).items() if k not in allowed}
    if "block_size" in allowed and not SPLIT_FIELDS & allowed:
        tokens = (a.tokens_per_iteration, b.tokens_per_iteration)
        changed = {k: v for k, v in changed.items() if k not in SPLIT_FIELDS}
        if tokens[0] != tokens[1]:
            changed["tokens an iteration"] = tokens
    return changed


def same_learning_rates(a: TrainConfig, b: TrainConfig) -> bool:
    """Whether peak, warm-up and schedule give the same learning rate at every iteration."""
    return a.max_iters == b.max_iters and all(
        learning_rate(a, i) == learning_rate(b, i) for i in telling_iterations((a, b), a.iterations)
    )


def patterns_in_effect(config: TrainConfig) -> tuple[AttentionPattern, ...]:
    """Attention pattern of every layer; full where it leaves nothing out at the config's length."""
    block = config.block_size
    return tuple(
        FULL if pattern.covers(block) else pattern for pattern in config.model.layer_patterns
    )


def infer_factor(changed: set[str]) -> str | None:
    """The one factor that covers all of ``changed``, the narrowest first; None if none does.

    A factor that is a whole recipe covers runs only where its own field differs too.
    """
    if len(changed) == 1:
        (name,) = changed
        return next((f for f in FACTORS if f == name), name)
    for name, fields in sorted(FACTORS.items(), key=lambda item: len(item[1])):
        if changed and changed <= fields and (name not in WHOLE_RECIPES or name in changed):
            return name
    return None
