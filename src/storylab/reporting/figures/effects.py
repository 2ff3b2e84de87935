"""Figures of a factorial experiment: all effects with their intervals, and pairs of factors together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import altair as alt
import numpy as np

from storylab.experiments.blocks import whole_seeds
from storylab.experiments.comparison import EQUIVALENT
from storylab.experiments.effects import EffectResult, effect_title
from storylab.experiments.outcome import Outcome
from storylab.reporting.figures.style import COLORS, Spec, done
from storylab.reporting.tables import Row, rounded

# Pairs of factors with a figure each, those with the largest estimates.
MOST_PAIRS = 3


def effects(outcome: Outcome) -> Spec | None:
    """All effects: dots with the intervals of their verdicts, over the band of the margin."""
    rows = _rows(outcome)
    if not rows:
        return None
    names = [row["name"] for row in rows]
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("name:N", title=None, sort=names, axis=alt.Axis(labelLimit=260)),
    )
    color = alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=["main effect", "interaction"], range=COLORS[:2]),
        legend=alt.Legend(orient="top"),
    )
    margins = base.mark_bar(opacity=0.25, color="#888", height={"band": 0.8}).encode(
        x="negative:Q", x2="margin:Q"
    )
    title = "effect on the final validation loss (nats)"
    intervals = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title=title), x2="high:Q", color=color
    )
    tooltip = ["name:N", "difference:Q", "low:Q", "high:Q", "verdict:N"]
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(
        x="difference:Q", color=color, tooltip=tooltip
    )
    zero = base.mark_rule(strokeDash=[4, 4], color="#888").encode(x=alt.datum(0))
    chart = zero + intervals + dots
    if outcome.record.margin is not None:
        chart = margins + chart
    return done(chart, height=max(60, 34 * len(rows)))


def _rows(outcome: Outcome) -> list[Row]:
    """Every effect that has an interval, with it."""
    rows: list[Row] = []
    for e in outcome.effects:
        interval, ends = e.judgement.interval, e.ends or e.judgement.ends
        if interval is None or ends is None or e.confounds or e.diverged:
            continue
        margin = e.judgement.margin
        rows.append(
            {
                "name": effect_title(e),
                "kind": "interaction" if e.is_interaction else "main effect",
                "difference": rounded(interval.estimate),
                "low": rounded(ends[0]),
                "high": rounded(ends[1]),
                "margin": margin,
                "negative": None if margin is None else -margin,
                "verdict": e.verdict,
            }
        )
    return rows


def pairs(outcome: Outcome) -> Iterator[tuple[str, Spec]]:
    """Caption and figure of the pairs of factors that may interact: the mean loss at all four levels."""
    found = [
        e
        for e in outcome.effects
        if e.is_interaction and e.judgement.interval and e.ends and e.verdict != EQUIVALENT
    ]
    found.sort(key=lambda e: -abs(e.judgement.interval.estimate if e.judgement.interval else 0.0))
    for e in found[:MOST_PAIRS]:
        rows = _pair_rows(outcome, e)
        if rows:
            yield (
                f"{effect_title(e)}: mean final loss, lines are parallel without interaction",
                _pair(outcome, e, rows),
            )


def _pair_rows(outcome: Outcome, e: EffectResult) -> list[Row]:
    """Mean loss over the cells at each of four levels, and over the seeds that all cells have."""
    design = outcome.factorial
    if design is None:
        return []
    arms = {cell.arm.name: cell.arm for cell in outcome.arms(e.condition)}
    cells = [{r.config.seed: r for r in arms[name].finished} for name in outcome.record.arms]
    seeds = dict.fromkeys(seed for cell in cells for seed in cell)
    whole = whole_seeds({seed: [cell.get(seed) for cell in cells] for seed in seeds})
    if not whole:
        return []
    losses = np.array([[run.loss for run in runs] for runs in whole.values()]).mean(axis=0)
    a, b = e.effect.factors
    levels = np.array(design.cells)
    rows = []
    for one, other in product((0, 1), repeat=2):
        chosen = (levels[:, a] == one) & (levels[:, b] == other)
        rows.append(
            {
                "first": design.factors[a].levels[one],
                "second": design.factors[b].levels[other],
                "loss": rounded(float(losses[chosen].mean())),
            }
        )
    return rows


def _pair(outcome: Outcome, e: EffectResult, rows: Sequence[Row]) -> Spec:
    design = outcome.factorial
    names = ["", ""] if design is None else [design.factors[i].name for i in e.effect.factors]
    order = list(dict.fromkeys(row["first"] for row in rows))
    lines = list(dict.fromkeys(row["second"] for row in rows))
    chart = (
        alt.Chart(alt.Data(values=list(rows)))
        .mark_line(point={"size": 60}, strokeWidth=2)
        .encode(
            x=alt.X("first:N", title=names[0], sort=order, axis=alt.Axis(labelAngle=0)),
            y=alt.Y("loss:Q", title="final validation loss (nats)", scale=alt.Scale(zero=False)),
            color=alt.Color(
                "second:N",
                title=names[1],
                scale=alt.Scale(domain=lines, range=COLORS[:2]),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=["first:N", "second:N", "loss:Q"],
        )
    )
    return done(chart, height=220)
