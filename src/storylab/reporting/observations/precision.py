"""Observations on low precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from storylab.config import GPT2_VOCAB_SIZE, TrainConfig
from storylab.experiments.comparison import EQUIVALENT, Arm
from storylab.experiments.factors import qualified_name
from storylab.experiments.order import common_values, order_of
from storylab.experiments.outcome import CellResult, Outcome
from storylab.experiments.verdicts import nats
from storylab.planning.gpus import GPUS
from storylab.planning.predict import can_run
from storylab.planning.roofline import gains
from storylab.planning.software import SOFTWARE
from storylab.precision.edit import find_recipe
from storylab.reporting.tables import final_loss, low_precision_share, quantization_rows

# The GPU of the original log.
PLANNED_GPU = GPUS["rtx5090"]


def precision_observations(outcome: Outcome) -> Iterable[str]:
    """The arms in order of harm, the most low precision that is as good as the baseline, the predicted
    gain, the loss in the arm's own precision, and the tensors with the largest quantization error."""
    for condition in outcome.conditions:
        yield from _harm(outcome, condition)
    yield from _predicted_gains(outcome)
    yield from _own_precision(outcome)
    yield from _worst_tensors(outcome)


def _harm(outcome: Outcome, condition: str) -> Iterable[str]:
    cells = {(cell.condition, cell.arm.name): cell for cell in outcome.cells}
    known = [
        (c, c.recipes)
        for c in outcome.comparisons
        if c.condition == condition and c.recipes and not c.confounds
    ]
    if not known:
        return
    known.sort(key=lambda entry: -entry[1].estimate)
    told = "; ".join(f"{c.arm} {nats(r.estimate)} ({c.verdict})" for c, r in known)
    where = qualified_name("", condition)
    text = f"In order of harm{where}, nats against {outcome.baseline}: {told}."
    yield text + unresolved_neighbors([cells[condition, c.arm].arm for c, _ in known])
    margin = known[0][0].judgement.margin
    if margin is None:
        return
    equal = [c.arm for c, _ in known if c.verdict == EQUIVALENT]
    if not equal:
        yield f"No arm is shown to be equivalent within {margin:g} nats{where}."
        return
    share, arm = max((low_precision_share(cells[condition, arm]) or 0.0, arm) for arm in equal)
    if share:  # arms may differ in another precision, as that of the residual stream
        yield (
            f"Of the arms that are equivalent within {margin:g} nats{where}, {arm} has "
            f"the most matrix multiplication in low precision: {share:.0%}."
        )


def unresolved_neighbors(arms: Sequence[Arm]) -> str:
    """Which neighbors in the order of harm the common seeds do not tell apart."""
    losses = common_values(arms, final_loss)
    if len(arms) < 2:
        return ""
    if not losses.size:
        return " The order is not resolved: these arms have no finished seed in common."
    # Most harm first, as in the order that is printed.
    groups = [[arms[i].name for i in reversed(group)] for group in order_of(losses).unresolved]
    if not groups:
        return " Each is resolved from the next."
    told = "; ".join(" and ".join(names) for names in reversed(groups))
    return f" Order not resolved between {told}."


def _predicted_gains(outcome: Outcome) -> Iterable[str]:
    bounds = [
        f"{cell.arm.name} {most:.2f}x"
        for cell in outcome.arms(outcome.conditions[0])
        if (most := _largest_gain(cell)) is not None
    ]
    if bounds:
        yield (
            f"Speed was not measured on hardware. The most that the recipes could bring the original log's "
            f"model on an {PLANNED_GPU.name} with compiled code is predicted (`storylab plan`): "
            f"{', '.join(bounds)}."
        )


def _own_precision(outcome: Outcome) -> Iterable[str]:
    for cell in outcome.cells:
        pairs = [
            (own.loss, run.loss)
            for run in cell.arm.finished
            if (own := run.results.validation_own_precision)
        ]
        if pairs:
            change = float(np.mean([own - wide for own, wide in pairs]))
            yield f"{cell.name}: evaluated in its own precision the loss is {change:+.4f} nats."


def _worst_tensors(outcome: Outcome) -> Iterable[str]:
    rows = quantization_rows(outcome)
    if rows:
        for name, text in (("error", "errs most"), ("underflow", "loses most values to zero")):
            worst = max(rows, key=lambda row: row[name] or 0.0)
            cell = qualified_name(worst["arm"], worst["condition"])
            where = f"block {worst['block']}, iteration {worst['iterations']}"
            yield f"Quantization {text} in {cell}: {worst['tensor']}, {where} ({worst[name]:.2%})."


def _largest_gain(cell: CellResult) -> float | None:
    """The most that an emulated arm's recipe could speed up the original log's model."""
    recipe = find_recipe(cell.config.dtype, cell.config.recipe)
    emulated = any(run.results.emulated for run in cell.arm.finished)
    if recipe is None or not emulated or not can_run(PLANNED_GPU, recipe):
        return None
    software = SOFTWARE["compiled"]
    return gains(TrainConfig(), GPT2_VOCAB_SIZE, PLANNED_GPU, software, recipe)[1]
