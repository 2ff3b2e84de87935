"""An experiment's arms in words: the table, the headline, and the command that trains them again."""

from __future__ import annotations

import re
import shlex

import numpy as np

from storylab.experiments.comparison import CONFOUNDED, DIVERGED, UNDECIDED, Comparison
from storylab.experiments.factors import qualified_name
from storylab.experiments.outcome import CellResult, Outcome
from storylab.experiments.registration import registration_lines
from storylab.experiments.verdicts import nats, ratio_text
from storylab.reporting.effects import effects_headline
from storylab.reporting.tables import low_precision_share, mean_of, training_seconds
from storylab.training.log_format import format_duration

MISSING = "not measured"
# Position of the column with the share of low precision, in the table of a precision experiment.
PRECISION_COLUMN = 4


def section_title(outcome: Outcome) -> str:
    """``Experiment 4: Sliding-window attention``, the number from the file's name."""
    number = re.match(r"0*(\d+)-", outcome.record.name)
    kind = f"Experiment {number[1]}" if number else "Experiment"
    return f"{kind}: {outcome.record.title}"


def plan_text(outcome: Outcome) -> str:
    """The looks, the way noise is estimated, and when the plan was registered and changed."""
    record = outcome.record
    looks = ", ".join(map(str, record.looks))
    parts = [f"looks at {looks} seeds, {record.variance} variance"] if looks else []
    if record.stage == "confirm":
        parts.append("confirmation on fresh seeds, judged on the test split")
    return "; ".join([*parts, *registration_lines(record)])


def repeat_command(outcome: Outcome) -> str:
    """The command that trains the same experiment again."""
    record = outcome.record
    if record.stage == "confirm":
        others = [arm for arm in record.arms if arm != record.baseline]
        return (
            f"storylab experiment confirm {shlex.quote(record.file)}"
            f"{f' --scale {record.scale}' if record.scale else ''} --only {shlex.join(others)} "
            f"--seeds {len(record.seeds)}"
        )
    seeds = {run.config.seed for run in outcome.runs}
    scale = f" --scale {record.scale}" if record.scale else ""
    count = f" --seeds {len(seeds)}" if seeds and len(seeds) != len(record.seeds) else ""
    planned = list(dict.fromkeys(cell.arm.name for cell in outcome.cells if cell.planned))
    some = planned and len(planned) < len(record.arms)
    only = f" --only {shlex.join(planned)}" if some else ""
    return f"storylab experiment run {shlex.quote(record.file)}{scale}{count}{only}"


def headline(outcome: Outcome) -> str:
    """An experiment's verdict in one sentence."""
    if outcome.effects:
        return effects_headline(outcome) + _reservations(outcome)
    if not outcome.comparisons:
        losses = outcome.baseline_of(outcome.conditions[0]).arm.losses
        if not losses:
            return "No finished run yet."
        spread = (
            f" ± {np.std(losses, ddof=1):.4f} over {len(losses)} seeds" if len(losses) > 1 else ""
        )
        return f"Baseline: validation loss {float(np.mean(losses)):.4f}{spread}."
    kinds: dict[str, list[str]] = {}
    for c in outcome.comparisons:
        shown = c.ends is not None and c.verdict != UNDECIDED
        difference = f" ({nats(c.recipes.estimate)})" if c.recipes and shown else ""
        kinds.setdefault(c.verdict, []).append(qualified_name(c.arm, c.condition) + difference)
    told = "; ".join(f"{kind}: {', '.join(arms)}" for kind, arms in kinds.items())
    return f"Against {outcome.baseline}, in nats: {told}.{_reservations(outcome)}"


def _reservations(outcome: Outcome) -> str:
    """Facts that a reader of the headline alone needs: exploratory, preliminary, on the test split."""
    judged = outcome.effects or outcome.comparisons
    kinds = [
        ("exploratory", any(entry.exploratory for entry in judged)),
        ("preliminary", any(entry.preliminary for entry in judged)),
    ]
    words = [word for word, holds in kinds if holds]
    text = f" {' and '.join(words).capitalize()}." if words else ""
    return text + " Confirmation on the test split." * (outcome.record.stage == "confirm")


def table_rows(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Headings and a row for every arm: loss, difference, speed, memory, time, verdict."""
    headings = [
        "arm",
        "parameters",
        "tokens",
        "epochs",
        "test loss" if outcome.record.stage == "confirm" else "val loss",
        "difference (interval of the verdict)",
        "tok/s",
        "speed",
        "memory",
        "training time",
        "energy",
        "seeds",
        "verdict",
    ]
    comparisons = {(c.condition, c.arm): c for c in outcome.comparisons}
    rows = []
    for cell in outcome.cells:
        c = comparisons.get((cell.condition, cell.arm.name))
        rows.append(_row(cell, c))
    if outcome.factor == "precision":
        headings.insert(PRECISION_COLUMN, "low precision")
        for row, cell in zip(rows, outcome.cells, strict=True):
            share = low_precision_share(cell)
            row.insert(PRECISION_COLUMN, "" if share is None else f"{share:.0%} of FLOPs")
    return headings, rows


def _row(cell: CellResult, c: Comparison | None) -> list[str]:
    runs = cell.arm.finished
    states = ", ".join(dict.fromkeys(run.state for run in cell.arm.runs if not run.finished))
    if not runs:
        # From the verdict's column on, a row says only how the arm ended.
        return [cell.name, *[""] * 10, f"0 of {cell.planned}", states or "no run"]
    speed = mean_of(cell.arm, lambda run: run.speed)
    memory = mean_of(cell.arm, lambda run: run.training_memory)
    seconds = mean_of(cell.arm, training_seconds)
    energy = mean_of(cell.arm, lambda run: run.results.energy_joules)
    losses = cell.arm.losses
    spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
    ratio = ""
    if c and c.speed:
        ratio = (
            "confounded" if c.speed_confounds else ratio_text(c.speed, "faster", "slower", "speed")
        )
    return [
        cell.name,
        f"{runs[0].parameters:,}",
        f"{runs[0].results.tokens:,}",
        f"{runs[0].results.epochs:.2f}",
        f"{float(np.mean(losses)):.4f}{spread}",
        _difference(c),
        f"{speed:,.0f}{' (emulated)' if runs[0].results.emulated else ''}" if speed else MISSING,
        ratio if c else "baseline",
        f"{memory / 1e9:.2f} GB" if memory else MISSING,
        format_duration(seconds) if seconds else MISSING,
        f"{energy / 3600:.1f} Wh" if energy else MISSING,
        f"{len(runs)} of {cell.planned}" if len(runs) < cell.planned else str(len(runs)),
        c.verdict if c else "baseline",
    ]


def _difference(c: Comparison | None) -> str:
    if c is None:
        return "baseline"
    if c.recipes is None or c.judgement.ends is None or c.verdict in (CONFOUNDED, DIVERGED):
        return ""
    low, high = c.ends or c.judgement.ends
    unpaired = "" if c.paired else ", unpaired"
    unpaired += "" if c.ends else ": the sign alone is settled"
    return f"{c.recipes.estimate:+.4f} ({low:+.4f} to {high:+.4f}{unpaired})"
