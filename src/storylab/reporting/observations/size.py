"""Observations on the size of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from storylab.experiments.factors import qualified_name
from storylab.experiments.order import common_values, order_of
from storylab.experiments.outcome import CellResult, Outcome
from storylab.experiments.statistics import mean_interval
from storylab.reporting.tables import final_loss, time_and_loss_front
from storylab.training.log_format import format_duration

# A size is as good as the best if its loss is within this many nats of it.
GOOD_ENOUGH = 0.02


def size_observations(outcome: Outcome) -> Iterable[str]:
    """The Pareto front, and the best trade by criteria that are named, as far as the seeds resolve
    them."""
    front = time_and_loss_front(outcome)
    if front:
        told = "; ".join(_group(group) for group in front)
        yield f"No other arm is shown to have both less training time and a lower loss than: {told}."
    for condition in outcome.conditions:
        yield from _best(outcome, condition)


def _group(group: Sequence[tuple[CellResult, float, float]]) -> str:
    names = [f"{cell.name} ({format_duration(time)}, {loss:.3f})" for cell, time, loss in group]
    if len(names) == 1:
        return names[0]
    return f"{' or '.join(names)} (not resolved between them)"


def _best(outcome: Outcome, condition: str) -> Iterable[str]:
    cells = [cell for cell in outcome.arms(condition) if cell.arm.finished]
    losses = common_values([cell.arm for cell in cells], final_loss)
    where = qualified_name("", condition)
    if not cells:
        return
    if not losses.size:
        yield f"The arms{where} have no finished seed in common: which loss is lowest is not known."
        return
    means, order = losses.mean(axis=1), order_of(losses)
    lowest = " or ".join(f"{cells[i].arm.name} ({means[i]:.3f})" for i in order.lowest)
    doubt = " (not resolved between them)" if len(order.lowest) > 1 else ""
    least = order.ranks[0]
    near = [i for i in range(len(cells)) if means[i] <= means[least] + GOOD_ENOUGH]
    small = min(near, key=lambda i: cells[i].arm.finished[0].parameters)
    text = (
        f"Lowest loss{where}: {lowest}{doubt}. Best trade by the criterion "
        f'"smallest whose mean is within {GOOD_ENOUGH} nats of the lowest": {cells[small].arm.name} '
        f"({cells[small].arm.finished[0].parameters:,} parameters, {means[small]:.3f})"
    )
    interval = mean_interval(list(losses[small] - losses[least]))
    if small != least and interval:
        shown = "shown" if interval.high <= GOOD_ENOUGH else "not shown"
        text += (
            f"; that it is within {GOOD_ENOUGH} is {shown}: {interval.estimate:+.4f} nats from "
            f"{cells[least].arm.name} (95 % CI {interval.low:+.4f} to {interval.high:+.4f})"
        )
    seeds = losses.shape[1]
    yield f"{text}. Over {seeds} common seed{'s' * (seeds != 1)}."
