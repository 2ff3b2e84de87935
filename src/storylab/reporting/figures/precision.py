"""Figures of quantization statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import altair as alt

from storylab.experiments.factors import qualified_name
from storylab.experiments.outcome import Outcome
from storylab.reporting.figures.style import Spec, done, where
from storylab.reporting.tables import Row, quantization_rows


def quantization(outcome: Outcome) -> Iterator[tuple[str, Spec]]:
    """Heat maps of quantization errors of tensors, by caption: the error of every arm, and all that
    was recorded over the training of the arm that errs most."""
    rows = quantization_rows(outcome)
    if rows:
        yield _mean_errors(rows)
        yield from _worst_arm(rows)


def _mean_errors(rows: Sequence[Row]) -> tuple[str, Spec]:
    """The error of every arm by tensor and block."""
    places: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        name = qualified_name(row["arm"], row["condition"])
        places.setdefault((name, row["tensor"], row["block"]), []).append(row)
    means = [
        {"arm": name, "place": _place(found[0]), "error": _mean_error(found)}
        for (name, *_), found in places.items()
    ]
    return (
        "Quantization error by tensor and block, mean over training",
        _heat_map(means, "arm", "arm", "error", "relative error"),
    )


def _worst_arm(rows: Sequence[Row]) -> Iterator[tuple[str, Spec]]:
    """All that was recorded over the training of the arm that errs most."""
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(where(row), []).append(row)
    worst = max(by_arm, key=lambda arm: _mean_error(by_arm[arm]))
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
            f"Quantization over the training of {worst}: {title}",
            _heat_map(cells, "iterations", "iterations", key, title),
        )


def _mean_error(rows: Sequence[Row]) -> float:
    return math.fsum(row["error"] for row in rows) / len(rows)


def _place(row: Row) -> str:
    return f"{row['tensor']}, block {row['block']:>2}"


def _heat_map(rows: Sequence[Row], x: str, title: str, key: str, color_title: str) -> Spec:
    """A rectangle for each ``place`` and value of ``x``; the darker the larger."""
    places = sorted({row["place"] for row in rows})
    chart = (
        alt.Chart(alt.Data(values=list(rows)))
        .mark_rect()
        .encode(
            x=alt.X(f"{x}:O", title=title, sort=None, axis=alt.Axis(labelAngle=-40)),
            y=alt.Y("place:O", title=None, sort=places, axis=alt.Axis(labelLimit=260)),
            color=alt.Color(
                f"{key}:Q", title=color_title, scale=alt.Scale(scheme="viridis", reverse=True)
            ),
            tooltip=["place:O", f"{x}:O", f"{key}:Q"],
        )
    )
    return done(chart, height=14 * len(places))
