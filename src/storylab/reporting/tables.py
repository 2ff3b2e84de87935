"""The rows behind the figures: plain dictionaries, computed from an experiment's runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from storylab.config import PRESENTATION_FIELDS, SEED_FIELDS, flat
from storylab.experiments.comparison import BETTER, WORSE, Arm
from storylab.experiments.order import common_values, front_of
from storylab.experiments.outcome import CellResult, Outcome
from storylab.experiments.statistics import mean_interval
from storylab.precision.edit import find_recipe
from storylab.precision.recipes import block_of, quantized_flops_fraction
from storylab.record.run import CurvePoint, Run
from storylab.record.schema import QuantizationRow

Row = dict[str, Any]
# Points that a curve is thinned to: more than a page's width shows, few enough for its size.
MOST_POINTS = 100
DIGITS = 5


def rounded(value: float | None) -> float | None:
    """``value`` to five significant digits; None if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def time_and_loss_front(outcome: Outcome) -> list[list[tuple[CellResult, float, float]]]:
    """The arms that none is shown to beat in both training seconds and final loss, cheapest first,
    with the means of both over the seeds that all arms have; arms that are not distinguished are one
    group. Empty if the arms have no seed in common."""
    cells = [cell for cell in outcome.cells if cell.arm.finished]
    arms = [cell.arm for cell in cells]
    seconds, losses = common_values(arms, training_seconds), common_values(arms, final_loss)
    if not losses.size:
        return []
    return [
        [(cells[i], float(seconds[i].mean()), float(losses[i].mean())) for i in group]
        for group in front_of(seconds, losses)
    ]


def curve_rows(outcome: Outcome) -> list[Row]:
    """Validation loss of every arm along its run: the mean over seeds and their range.

    Every point of an arm is a mean over the same runs: over those that finished, or while none has,
    over all of them up to where the shortest has come. So a run that diverged leaves no step.
    """
    rows = []
    for cell in outcome.cells:
        for evaluations in _by_iteration(cell.arm):
            losses = [e.val_loss for e in evaluations]
            energies = [e.energy_joules for e in evaluations]
            rows.append(
                {
                    "condition": cell.condition,
                    "arm": cell.arm.name,
                    "iterations": evaluations[0].iteration,
                    "tokens": evaluations[0].tokens,
                    "seconds": rounded(float(np.mean([e.seconds for e in evaluations]))),
                    "joules": _mean_energy(energies),
                    "loss": rounded(float(np.mean(losses))),
                    "low": rounded(min(losses)),
                    "high": rounded(max(losses)),
                    "seeds": f"{len(losses)} of {cell.planned}",
                }
            )
    return rows


def _mean_energy(joules: Sequence[float | None]) -> float | None:
    """Mean of energies that every seed has; None if one lacks it."""
    known = [value for value in joules if value is not None]
    return rounded(float(np.mean(known))) if len(known) == len(joules) else None


def difference_rows(outcome: Outcome) -> list[Row]:
    """Arm minus baseline along the run, paired by seed, with the 95 % interval over seeds.

    Every point of an arm is a mean over the same pairs: see ``curve_rows``.
    """
    rows = []
    for condition in outcome.conditions:
        baseline = {r.seeds: r for r in outcome.baseline_of(condition).arm.runs}
        for cell in outcome.arms(condition):
            if cell.arm.name == outcome.baseline:
                continue
            pairs = [(run, baseline[run.seeds]) for run in cell.arm.runs if run.seeds in baseline]
            finished = [(a, b) for a, b in pairs if a.finished and b.finished]
            rows += [
                {"condition": condition, "arm": cell.arm.name, **row}
                for row in _differences(finished or pairs)
            ]
    return rows


def _differences(pairs: Sequence[tuple[Run, Run]]) -> Iterable[Row]:
    curves = [{e.iteration: e.val_loss for e in run.evaluations} for pair in pairs for run in pair]
    common = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    for iteration in sorted(common):
        losses = [curve[iteration] for curve in curves]
        values = [ours - base for ours, base in zip(losses[::2], losses[1::2], strict=True)]
        interval = mean_interval(values)
        yield {
            "iterations": iteration,
            "difference": rounded(float(np.mean(values))),
            "low": rounded(interval.low) if interval else None,
            "high": rounded(interval.high) if interval else None,
            "pairs": len(values),
        }


def final_rows(outcome: Outcome) -> list[Row]:
    """Final loss of every arm minus the baseline's, with its interval and the margin, if there is one."""
    rows = []
    for c in outcome.comparisons:
        ends = c.ends or (c.judgement.ends if c.verdict in (BETTER, WORSE) else None)
        if c.recipes is None or ends is None:
            continue
        rows.append(
            {
                "condition": c.condition,
                "arm": c.arm,
                "difference": rounded(c.recipes.estimate),
                "low": rounded(ends[0]),
                "high": rounded(ends[1]),
                "margin": rounded(c.judgement.margin),
                "verdict": c.verdict,
            }
        )
    return rows


def run_rows(outcome: Outcome) -> list[Row]:
    """Every run: its final loss, speed, memory, time and size."""
    rows = []
    for cell in outcome.cells:
        for run in cell.arm.runs:
            summary = run.summary
            rows.append(
                {
                    "condition": cell.condition,
                    "arm": cell.arm.name,
                    "seed": run.config.seed,
                    "state": run.state,
                    "loss": rounded(run.loss),
                    "speed": rounded(run.speed),
                    "memory": rounded((run.training_memory or math.nan) / 1e9),
                    "seconds": rounded(summary.training_seconds if summary else None),
                    "parameters": summary.parameters if summary else None,
                    "learning_rate": run.config.learning_rate,
                }
            )
    return rows


def step_rows(outcome: Outcome) -> list[Row]:
    """Training loss, gradient norm, learning rate and speed of one seed of every arm, thinned."""
    rows = []
    for cell in outcome.cells:
        if not cell.arm.runs:
            continue
        iterations = cell.arm.runs[0].iterations
        size = max(1, math.ceil(len(iterations) / MOST_POINTS))
        for first in range(0, len(iterations), size):
            part = iterations[first : first + size]
            row: Row = {
                "condition": cell.condition,
                "arm": cell.arm.name,
                "iterations": part[-1].iteration,
            }
            for name, key in (
                ("training loss", "loss"),
                ("gradient norm", "grad_norm"),
                ("learning rate", "learning_rate"),
                ("tokens a second", "tokens_per_second"),
            ):
                # A float16 step that was skipped has no gradient norm.
                found = [getattr(entry, key) for entry in part]
                values = [value for value in found if value is not None]
                row[name] = rounded(float(np.mean(values))) if values else None
            rows.append(row)
    return rows


def position_rows(outcome: Outcome) -> list[Row]:
    """Loss of the targets at each position of the window, the mean over seeds, thinned."""
    rows = []
    for cell in outcome.cells:
        tables = [run.position_losses for run in cell.arm.finished if len(run.position_losses)]
        if not tables or len({len(table) for table in tables}) > 1:
            continue
        mean = np.mean(tables, axis=0)
        edges = np.unique(np.geomspace(1, len(mean), 33).round().astype(int))
        for first, end in zip(np.concatenate(([0], edges[:-1])), edges, strict=True):
            rows.append(
                {
                    "condition": cell.condition,
                    "arm": cell.arm.name,
                    "position": int(end),
                    "loss": rounded(float(mean[first:end].mean())),
                }
            )
    return rows


def quantization_rows(outcome: Outcome) -> list[Row]:
    """Quantization errors of the tensors of every arm that recorded them, first finished seed: means
    over the linear layers of a block, by tensor and product and by iteration."""
    rows = []
    for cell in outcome.cells:
        groups: dict[tuple[str, int, int], list[QuantizationRow]] = {}
        for row in cell.arm.finished[0].quantization if cell.arm.finished else ():
            tensor = f"{row.tensor}, {row.product.replace('_', ' ')}"
            block = block_of(row.layer)
            groups.setdefault((tensor, block, row.iteration), []).append(row)
        for (tensor, block, iteration), found in groups.items():
            means = {
                name: rounded(float(np.mean([getattr(row, name) for row in found])))
                for name in ("error", "underflow", "saturation")
            }
            spans = [row.scale_high - row.scale_low for row in found]
            means["scale range"] = rounded(float(np.mean(spans)))
            place = {"tensor": tensor, "block": block, "iterations": iteration}
            rows.append({"condition": cell.condition, "arm": cell.arm.name} | place | means)
    return rows


def low_precision_share(cell: CellResult) -> float | None:
    """Share of an arm's matrix multiplication in low precision; None without runs."""
    if not cell.arm.runs:
        return None
    config = cell.config
    recipe = find_recipe(config.dtype, config.recipe)
    if recipe is None:
        return 0.0
    vocab_size = cell.arm.runs[0].data.tokenizer.vocab_size
    return quantized_flops_fraction(recipe, config.model, vocab_size, config.block_size)


def _by_iteration(arm: Arm) -> Iterable[list[CurvePoint]]:
    """Evaluations of the same iteration, of every finished run, or of every run if none finished."""
    curves = [{e.iteration: e for e in run.evaluations} for run in arm.finished or arm.runs]
    common = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    for iteration in sorted(common):
        yield [curve[iteration] for curve in curves]


def mean_of(arm: Arm, number: Callable[[Run], float | None]) -> float | None:
    """Mean over an arm's finished runs of a number that each has; None if one lacks it."""
    values = [number(run) for run in arm.finished]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def final_loss(run: Run) -> float:
    """Final validation loss of a run, in nats."""
    return float(run.loss)


def training_seconds(run: Run) -> float:
    """Seconds that a run spent in its iterations, evaluations left out."""
    return float(run.results.training_seconds)


def flat_config(cell: CellResult) -> Row:
    """The config of an arm as text by field, without seeds and the fields that cannot change a result."""
    config = cell.arm.runs[0].config if cell.arm.runs else cell.config
    values = flat(config, PRESENTATION_FIELDS | SEED_FIELDS)
    return {key: str(value) for key, value in values.items()}
