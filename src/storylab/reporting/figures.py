"""The figures as Vega-Lite: one specification each for the page and for the pictures of the log."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from storylab.experiments.factors import under
from storylab.experiments.outcome import Outcome
from storylab.record.run import ENDED
from storylab.reporting.tables import (
    Row,
    curve_rows,
    difference_rows,
    final_rows,
    position_rows,
    quantization_rows,
    run_rows,
    step_rows,
    time_and_loss_front,
)

Spec = dict[str, Any]

# Okabe & Ito's colours, told apart with any colour vision; black last, as pages may be dark.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800", "#7F7F7F"]
AXES = {
    "iterations": "iterations",
    "tokens": "tokens",
    "seconds": "training seconds (measured)",
    "joules": "joules (measured)",
}


def curves(outcome: Outcome) -> Spec | None:
    """Validation loss along the run, a line an arm with the range over seeds.

    The parameter ``hidden`` names the arms left out, ``condition`` the condition shown, ``axis``
    what the horizontal axis counts.
    """
    rows = curve_rows(outcome)
    if not rows:
        return None
    base = _along(outcome, rows).encode(
        y=alt.Y("loss:Q", title="validation loss (nats)", scale=alt.Scale(zero=False)),
    )
    band = base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q"), y2="high:Q")
    tooltip = ["arm:N", "iterations:Q", "tokens:Q", "seconds:Q", "loss:Q", "low:Q", "high:Q"]
    lines = base.mark_line(strokeWidth=2)
    points = base.mark_point(filled=True, size=30, opacity=0.9).encode(tooltip=tooltip)
    return _done(band + _zoomed(lines) + points)


def differences(outcome: Outcome) -> Spec | None:
    """Validation loss minus the baseline's along the run, with its 95 % band over seeds."""
    rows = difference_rows(outcome)
    if not rows:
        return None
    title = f"validation loss minus {outcome.baseline} (nats)"
    base = _along(outcome, rows, axis=False).encode(y=alt.Y("difference:Q", title=title))
    band = base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q"), y2="high:Q")
    tooltip = ["arm:N", "iterations:Q", "difference:Q", "low:Q", "high:Q"]
    lines = base.mark_line(strokeWidth=2, point={"size": 30}).encode(tooltip=tooltip)
    zero = (
        alt.Chart(alt.Data(values=[{"zero": 0}]))
        .mark_rule(strokeDash=[4, 4], color="#888")
        .encode(y="zero:Q")
    )
    return _done(band + zero + _zoomed(lines))


def finals(outcome: Outcome) -> Spec | None:
    """Final losses minus the baseline's: dots with 95 % intervals over a band of seed noise."""
    rows = final_rows(outcome)
    if not rows:
        return None
    names = [_where(row) for row in rows]
    for row, name in zip(rows, names, strict=True):
        noise = row.pop("noise")
        row |= {"name": name, "quiet": noise, "negative": None if noise is None else -noise}
    title = f"final validation loss minus {outcome.baseline} (nats)"
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("name:N", title=None, sort=names, axis=alt.Axis(labelLimit=260)),
    )
    noise_band = base.mark_bar(opacity=0.25, color="#888", height={"band": 0.8}).encode(
        x=alt.X("negative:Q", title=title), x2="quiet:Q"
    )
    intervals = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q", color=_colour(outcome))
    tooltip = ["name:N", "difference:Q", "low:Q", "high:Q", "verdict:N"]
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(
        x="difference:Q", color=_colour(outcome), tooltip=tooltip
    )
    zero = base.mark_rule(strokeDash=[4, 4], color="#888").encode(x=alt.datum(0))
    return _done(noise_band + zero + intervals + dots, height=max(60, 34 * len(rows)))


def speeds(outcome: Outcome) -> Spec | None:
    """Tokens a second of every run."""
    return _dots(outcome, "speed", "tokens a second (measured)")


def memories(outcome: Outcome) -> Spec | None:
    """Peak memory of every run."""
    return _dots(outcome, "memory", "peak memory in GB (measured)")


def _dots(outcome: Outcome, key: str, title: str) -> Spec | None:
    rows = [row | {"name": _where(row)} for row in run_rows(outcome) if row[key] is not None]
    if not rows:
        return None
    names = list(dict.fromkeys(row["name"] for row in rows))
    chart = (
        alt.Chart(alt.Data(values=_only(rows, ("name", "arm", "seed", key))))
        .mark_point(filled=True, size=60, opacity=0.8)
        .encode(
            x=alt.X(f"{key}:Q", title=title, scale=alt.Scale(zero=True)),
            y=alt.Y("name:N", title=None, sort=names, axis=alt.Axis(labelLimit=260)),
            color=_colour(outcome),
            tooltip=["name:N", "seed:N", f"{key}:Q"],
        )
    )
    return _done(chart, height=max(60, 24 * len(names)))


def steps(outcome: Outcome) -> Iterator[tuple[str, Spec]]:
    """Figures along the run, one seed of every arm, by what they show."""
    rows = step_rows(outcome)
    for name in ("training loss", "gradient norm", "learning rate", "tokens a second"):
        if known := [row for row in rows if row[name] is not None]:
            yield name, _steps(outcome, known, name)


def _steps(outcome: Outcome, rows: Sequence[Row], name: str) -> Spec:
    kept = _only(rows, ("condition", "arm", "iterations", name))
    # Logarithmic where values differ in order of magnitude and none is zero.
    low = min(row[name] for row in kept)
    log = name == "gradient norm" and low > 0
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    chart = _along(outcome, kept, axis=False).encode(y=alt.Y(f"{name}:Q", title=name, scale=scale))
    lines = chart.mark_line(strokeWidth=1.5).encode(tooltip=["arm:N", "iterations:Q", f"{name}:Q"])
    return _done(_zoomed(lines), height=220)


def pareto(outcome: Outcome) -> Spec | None:
    """Final loss against training time, a point a run, its area the size of the model; the line
    joins the arms that none beats in both."""
    rows = [row for row in run_rows(outcome) if row["loss"] is not None and row["seconds"]]
    if outcome.factor != "size" or not rows:
        return None
    rows = [row | {"million": row["parameters"] / 1e6} for row in rows]
    front = [
        {"seconds": seconds, "loss": loss} for _, seconds, loss in time_and_loss_front(outcome)
    ]
    x = alt.X("seconds:Q", title="training seconds (measured)", scale=alt.Scale(type="log"))
    y = alt.Y("loss:Q", title="final validation loss (nats)", scale=alt.Scale(zero=False))
    kept = _only(rows, ("condition", "arm", "seed", "loss", "seconds", "million"))
    points = (
        alt.Chart(alt.Data(values=kept))
        .mark_point(filled=True, opacity=0.75)
        .encode(
            x=x,
            y=y,
            color=_colour(outcome),
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
    return _done(line + points)


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
    kept = _only(rows, ("arm", "seed", "learning_rate", "loss", "result"))
    shapes = alt.Scale(domain=["finished", "diverged"], range=["circle", "cross"])
    chart = (
        alt.Chart(alt.Data(values=kept))
        .mark_point(filled=True, size=80, opacity=0.8)
        .encode(
            x=alt.X("learning_rate:Q", title="peak learning rate", scale=alt.Scale(type="log")),
            y=alt.Y("loss:Q", title="final validation loss (nats)", scale=alt.Scale(zero=False)),
            color=_colour(outcome),
            shape=alt.Shape("result:N", title=None, scale=shapes),
            tooltip=["arm:N", "seed:N", "learning_rate:Q", "loss:Q", "result:N"],
        )
    )
    return _done(chart)


def positions(outcome: Outcome) -> Spec | None:
    """Loss by position in the window: where a sliding window has less to read, and at what cost."""
    rows = position_rows(outcome)
    if outcome.factor != "attention" or not rows:
        return None
    chart = (
        _along(outcome, rows, axis=False, x="position", log=True)
        .mark_line(strokeWidth=2)
        .encode(
            y=alt.Y("loss:Q", title="validation loss (nats)", scale=alt.Scale(zero=False)),
            tooltip=["arm:N", "position:Q", "loss:Q"],
        )
    )
    return _done(_zoomed(chart))


def quantization(outcome: Outcome) -> Iterator[tuple[str, Spec]]:
    """Heat maps of what quantisation does to tensors, by caption: the error of every arm, and all that
    was recorded over the training of the arm that errs most."""
    rows = quantization_rows(outcome)
    if not rows:
        return
    places: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        name = under(row["arm"], row["condition"])
        places.setdefault((name, row["tensor"], row["block"]), []).append(row)
    means = [
        {
            "arm": name,
            "place": _place(found[0]),
            "error": math.fsum(row["error"] for row in found) / len(found),
        }
        for (name, *_), found in places.items()
    ]
    yield (
        "Quantisation error by tensor and block, mean over training",
        _heat_map(means, "arm", "arm", "error", "relative error"),
    )
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(_where(row), []).append(row)
    worst = max(
        by_arm, key=lambda arm: math.fsum(r["error"] for r in by_arm[arm]) / len(by_arm[arm])
    )
    for key, title in (
        ("error", "relative error"),
        ("underflow", "share that became zero"),
        ("saturation", "share beyond the format's range"),
        ("scale range", "binary orders from smallest to largest scale"),
    ):
        cells = [
            {"iterations": row["iterations"], "place": _place(row), key: row[key]}
            for row in by_arm[worst]
        ]
        yield (
            f"Quantisation over the training of {worst}: {title}",
            _heat_map(cells, "iterations", "iterations", key, title),
        )


def _place(row: Row) -> str:
    return f"{row['tensor']}, block {row['block']:>2}"


def _heat_map(rows: Sequence[Row], x: str, title: str, key: str, colour_title: str) -> Spec:
    """A rectangle for each ``place`` and value of ``x``; the darker the larger."""
    places = sorted({row["place"] for row in rows})
    chart = (
        alt.Chart(alt.Data(values=list(rows)))
        .mark_rect()
        .encode(
            x=alt.X(f"{x}:O", title=title, sort=None, axis=alt.Axis(labelAngle=-40)),
            y=alt.Y("place:O", title=None, sort=places, axis=alt.Axis(labelLimit=260)),
            color=alt.Color(
                f"{key}:Q", title=colour_title, scale=alt.Scale(scheme="viridis", reverse=True)
            ),
            tooltip=["place:O", f"{x}:O", f"{key}:Q"],
        )
    )
    return _done(chart, height=14 * len(places))


def _along(
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
            x=alt.X(f"{x}:Q", title=titles.get(x, x), scale=scale), color=_colour(outcome)
        )
    return (
        chart.add_params(alt.param(name="axis", value="iterations"))
        .transform_calculate(along="datum[axis]")
        .encode(x=alt.X("along:Q", title="", scale=scale), color=_colour(outcome))
    )


def _zoomed(chart: Any) -> Any:
    """A chart to drag and zoom. Its names are given: altair would count them up over a process."""
    zoom = alt.selection_interval(name="zoom", bind="scales")
    return chart.properties(name="curves").add_params(zoom)


def _colour(outcome: Outcome) -> Any:
    arms = list(dict.fromkeys(cell.arm.name for cell in outcome.cells))
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(arms))]
    legend = alt.Legend(orient="top", symbolOpacity=1, labelLimit=260, columns=4)
    return alt.Color(
        "arm:N", title=None, scale=alt.Scale(domain=arms, range=colours), legend=legend
    )


def _where(row: Row) -> str:
    return under(row["arm"], row["condition"])


def _only(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    return [{key: row[key] for key in keys} for row in rows]


def _done(chart: Any, height: int = 300) -> Spec:
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
