"""Figures of speed and memory."""

from __future__ import annotations

import altair as alt

from storylab.experiments.outcome import Outcome
from storylab.reporting.figures.style import Spec, color, done, only, where
from storylab.reporting.tables import run_rows


def speeds(outcome: Outcome) -> Spec | None:
    """Tokens a second of every run."""
    return _dots(outcome, "speed", "tokens a second (measured)")


def memories(outcome: Outcome) -> Spec | None:
    """Peak memory of every run."""
    return _dots(outcome, "memory", "peak memory in GB (measured)")


def _dots(outcome: Outcome, key: str, title: str) -> Spec | None:
    rows = [row | {"name": where(row)} for row in run_rows(outcome) if row[key] is not None]
    if not rows:
        return None
    names = list(dict.fromkeys(row["name"] for row in rows))
    chart = (
        alt.Chart(alt.Data(values=only(rows, ("name", "arm", "seed", key))))
        .mark_point(filled=True, size=60, opacity=0.8)
        .encode(
            x=alt.X(f"{key}:Q", title=title, scale=alt.Scale(zero=True)),
            y=alt.Y("name:N", title=None, sort=names, axis=alt.Axis(labelLimit=260)),
            color=color(outcome),
            tooltip=["name:N", "seed:N", f"{key}:Q"],
        )
    )
    return done(chart, height=max(60, 24 * len(names)))
