"""Figures of the loss: along the run, at its end, by position, by learning rate, by time and size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import altair as alt

from storylab.experiments.outcome import Outcome
from storylab.record.run import ENDED
from storylab.reporting.figures.style import Spec, along, color, done, only, where, zoomed
from storylab.reporting.tables import (
    Row,
    curve_rows,
    difference_rows,
    final_rows,
    position_rows,
    run_rows,
    step_rows,
    time_and_loss_front,
)


def curves(outcome: Outcome) -> Spec | None:
    """Validation loss along the run, a line an arm with the range over seeds.

    The parameter ``hidden`` names the arms left out, ``condition`` the condition shown, ``axis``
    the quantity on the horizontal axis.
    """
    rows = curve_rows(outcome)
    if not rows:
        return None
    base = along(outcome, rows).encode(
        y=alt.Y("loss:Q", title="validation loss (nats)", scale=alt.Scale(zero=False)),
    )
    band = base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q"), y2="high:Q")
    tooltip = ["arm:N", "iterations:Q", "tokens:Q", "seconds:Q", "loss:Q", "low:Q", "high:Q"]
    tooltip.append("seeds:N")
    lines = base.mark_line(strokeWidth=2)
    points = base.mark_point(filled=True, size=30, opacity=0.9).encode(tooltip=tooltip)
    return done(band + zoomed(lines) + points)


def differences(outcome: Outcome) -> Spec | None:
    """Validation loss minus the baseline's along the run, with its 95 % band over seeds."""
    rows = difference_rows(outcome)
    if not rows:
        return None
    title = f"validation loss minus {outcome.baseline} (nats)"
    base = along(outcome, rows, axis=False).encode(y=alt.Y("difference:Q", title=title))
    band = base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q"), y2="high:Q")
    tooltip = ["arm:N", "iterations:Q", "difference:Q", "low:Q", "high:Q", "pairs:Q"]
    lines = base.mark_line(strokeWidth=2, point={"size": 30}).encode(tooltip=tooltip)
    zero = (
        alt.Chart(alt.Data(values=[{"zero": 0}]))
        .mark_rule(strokeDash=[4, 4], color="#888")
        .encode(y="zero:Q")
    )
    return done(band + zero + zoomed(lines))


def finals(outcome: Outcome) -> Spec | None:
    """Final losses minus the baseline's: dots with the intervals of the verdicts, over a band of the
    margin if the experiment has one."""
    rows = final_rows(outcome)
    if not rows:
        return None
    names = [where(row) for row in rows]
    for row, name in zip(rows, names, strict=True):
        margin = row.pop("margin")
        row |= {"name": name, "margin": margin, "negative": None if margin is None else -margin}
    title = f"final validation loss minus {outcome.baseline} (nats)"
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("name:N", title=None, sort=names, axis=alt.Axis(labelLimit=260)),
    )
    margins = base.mark_bar(opacity=0.25, color="#888", height={"band": 0.8}).encode(
        x="negative:Q", x2="margin:Q"
    )
    intervals = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title=title), x2="high:Q", color=color(outcome)
    )
    tooltip = ["name:N", "difference:Q", "low:Q", "high:Q", "verdict:N"]
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(
        x="difference:Q", color=color(outcome), tooltip=tooltip
    )
    zero = base.mark_rule(strokeDash=[4, 4], color="#888").encode(x=alt.datum(0))
    chart = zero + intervals + dots
    if any(row["margin"] is not None for row in rows):
        chart = margins + chart
    return done(chart, height=max(60, 34 * len(rows)))


def steps(outcome: Outcome) -> Iterator[tuple[str, Spec]]:
    """Figures along the run, one seed of every arm, by the name of their quantity."""
    rows = step_rows(outcome)
    for name in ("training loss", "gradient norm", "learning rate", "tokens a second"):
        if known := [row for row in rows if row[name] is not None]:
            yield name, _steps(outcome, known, name)


def _steps(outcome: Outcome, rows: Sequence[Row], name: str) -> Spec:
    kept = only(rows, ("condition", "arm", "iterations", name))
    # Logarithmic where values differ in order of magnitude and none is zero.
    low = min(row[name] for row in kept)
    log = name == "gradient norm" and low > 0
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    chart = along(outcome, kept, axis=False).encode(y=alt.Y(f"{name}:Q", title=name, scale=scale))
    lines = chart.mark_line(strokeWidth=1.5).encode(tooltip=["arm:N", "iterations:Q", f"{name}:Q"])
    return done(zoomed(lines), height=220)


def pareto(outcome: Outcome) -> Spec | None:
    """Final loss against training time, a point a run, its area the size of the model; the line
    joins those that are shown to have a lower loss than every cheaper arm."""
    rows = [row for row in run_rows(outcome) if row["loss"] is not None and row["seconds"]]
    if outcome.factor != "size" or not rows:
        return None
    rows = [row | {"million": row["parameters"] / 1e6} for row in rows]
    front = [
        {"seconds": seconds, "loss": loss}
        for (_, seconds, loss), *_ in time_and_loss_front(outcome)
    ]
    x = alt.X("seconds:Q", title="training seconds (measured)", scale=alt.Scale(type="log"))
    y = alt.Y("loss:Q", title="final validation loss (nats)", scale=alt.Scale(zero=False))
    kept = only(rows, ("condition", "arm", "seed", "loss", "seconds", "million"))
    points = (
        alt.Chart(alt.Data(values=kept))
        .mark_point(filled=True, opacity=0.75)
        .encode(
            x=x,
            y=y,
            color=color(outcome),
            shape=alt.Shape("condition:N", title=None),
            size=alt.Size(
                "million:Q", title="million parameters", scale=alt.Scale(range=[40, 400])
            ),
            tooltip=["arm:N", "condition:N", "seed:N", "loss:Q", "seconds:Q", "million:Q"],
        )
    )
    line = (
        alt.Chart(alt.Data(values=front))
        .mark_line(strokeDash=[5, 3], color="#888")
        .encode(x=x, y=y, order="seconds:Q")
    )
    return done(line + points)


def learning_rates(outcome: Outcome) -> Spec | None:
    """Final loss against the peak learning rate, a point a run; a diverged run is a cross on top."""
    if outcome.factor != "learning_rate":
        return None
    rows = [row for row in run_rows(outcome) if row["state"] in ENDED]
    finite = [row["loss"] for row in rows if row["loss"] is not None]
    if not finite:
        return None
    for row in rows:
        row["result"] = "diverged" if row["loss"] is None else "finished"
        row["loss"] = max(finite) if row["loss"] is None else row["loss"]
    kept = only(rows, ("arm", "seed", "learning_rate", "loss", "result"))
    shapes = alt.Scale(domain=["finished", "diverged"], range=["circle", "cross"])
    chart = (
        alt.Chart(alt.Data(values=kept))
        .mark_point(filled=True, size=80, opacity=0.8)
        .encode(
            x=alt.X("learning_rate:Q", title="peak learning rate", scale=alt.Scale(type="log")),
            y=alt.Y("loss:Q", title="final validation loss (nats)", scale=alt.Scale(zero=False)),
            color=color(outcome),
            shape=alt.Shape("result:N", title=None, scale=shapes),
            tooltip=["arm:N", "seed:N", "learning_rate:Q", "loss:Q", "result:N"],
        )
    )
    return done(chart)


def positions(outcome: Outcome) -> Spec | None:
    """Loss by position in the window, which shows the cost of a sliding window where it reads less."""
    rows = position_rows(outcome)
    if outcome.factor != "attention" or not rows:
        return None
    chart = (
        along(outcome, rows, axis=False, x="position", log=True)
        .mark_line(strokeWidth=2)
        .encode(
            y=alt.Y("loss:Q", title="validation loss (nats)", scale=alt.Scale(zero=False)),
            tooltip=["arm:N", "position:Q", "loss:Q"],
        )
    )
    return done(zoomed(chart))
