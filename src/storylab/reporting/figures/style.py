"""The form that all figures share: axes, colors, zoom, and the static form for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from storylab.experiments.factors import qualified_name
from storylab.experiments.outcome import Outcome
from storylab.reporting.tables import Row

Spec = dict[str, Any]

# Okabe & Ito's colors, distinct to any color vision; black last, as pages may be dark.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800", "#7F7F7F"]
AXES = {
    "iterations": "iterations",
    "tokens": "tokens",
    "seconds": "training seconds (measured)",
    "joules": "joules (measured)",
}


def along(
    outcome: Outcome,
    rows: Sequence[Row],
    axis: bool = True,
    x: str = "iterations",
    log: bool = False,
) -> Any:
    """A chart along the run, of the arms and the condition that its parameters choose."""
    hidden = alt.param(name="hidden", value=[])
    condition = alt.param(name="condition", value=outcome.conditions[0])
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    titles = {"position": "position in the window (tokens before it + 1)"}
    chart = (
        alt.Chart(alt.Data(values=list(rows)))
        .transform_filter("datum.condition === condition && indexof(hidden, datum.arm) < 0")
        .add_params(hidden, condition)
    )
    if not axis:
        return chart.encode(
            x=alt.X(f"{x}:Q", title=titles.get(x, x), scale=scale), color=color(outcome)
        )
    return (
        chart.add_params(alt.param(name="axis", value="iterations"))
        .transform_calculate(along="datum[axis]")
        .encode(x=alt.X("along:Q", title="", scale=scale), color=color(outcome))
    )


def zoomed(chart: Any) -> Any:
    """A chart to drag and zoom. Its names are fixed: altair would number them through the whole process."""
    zoom = alt.selection_interval(name="zoom", bind="scales")
    return chart.properties(name="curves").add_params(zoom)


def color(outcome: Outcome) -> Any:
    """The color of an arm, with a legend on top."""
    arms = list(dict.fromkeys(cell.arm.name for cell in outcome.cells))
    colors = [COLORS[i % len(COLORS)] for i in range(len(arms))]
    legend = alt.Legend(orient="top", symbolOpacity=1, labelLimit=260, columns=4)
    return alt.Color("arm:N", title=None, scale=alt.Scale(domain=arms, range=colors), legend=legend)


def where(row: Row) -> str:
    """Arm and condition of a row."""
    return qualified_name(row["arm"], row["condition"])


def only(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """The rows with these keys alone."""
    return [{key: row[key] for key in keys} for row in rows]


def done(chart: Any, height: int = 300) -> Spec:
    """The chart as a specification, as wide as its container on the page."""
    spec: Spec = chart.properties(width="container", height=height).to_dict()
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["background"] = "transparent"
    return spec


def static(spec: Spec, title: str, axis: str = "iterations", width: int = 560) -> Spec:
    """A figure for a picture that no one can click: a fixed width, its axis named, on white."""
    fixed = {k: v for k, v in spec.items() if k != "autosize"}
    fixed |= {"width": width, "background": "white", "title": {"text": title, "anchor": "start"}}
    return _named_axis(fixed, AXES.get(axis, axis))


def _named_axis(value: Any, name: str) -> Any:
    """The specification with the switchable axis given its name."""
    if isinstance(value, dict):
        if value.get("field") == "along":
            return value | {"title": name}
        return {key: _named_axis(entry, name) for key, entry in value.items()}
    if isinstance(value, list):
        return [_named_axis(entry, name) for entry in value]
    return value


def condition_of(spec: Spec, condition: str) -> Spec:
    """A figure with another condition chosen than the first."""
    params = [
        p | {"value": condition} if p.get("name") == "condition" else p
        for p in spec.get("params", [])
    ]
    return spec | {"params": params}
