"""index.html: one self-contained page, with everything that the log has and figures to play with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
import vl_convert

from storylab.experiments.outcome import Outcome
from storylab.reporting.arms import (
    headline,
    plan_text,
    repeat_command,
    section_title,
    table_rows,
)
from storylab.reporting.effects import effect_table, factor_text, verdicts_in_full
from storylab.reporting.figures.style import AXES, COLORS, Spec
from storylab.reporting.observations import observations
from storylab.reporting.tables import curve_rows, flat_config
from storylab.training.log_format import printable


def html(
    outcomes: Sequence[Outcome],
    figures: Mapping[str, Mapping[str, Spec]],
    problems: Sequence[str],
    choices: Mapping[str, Sequence[str]],
    bundle: str | None = None,
) -> str:
    """The whole page.

    Args:
        outcomes: the experiments.
        figures: each experiment's specifications by caption, by the experiment's label.
        problems: records that could not be read.
        choices: lines on the choices behind each experiment, by its label.
        bundle: address of the script that draws the figures; by default the page holds that script.
    """
    content = {
        "overview": {
            "headings": ["experiment", "scale", "baseline loss", "verdicts"],
            "rows": [_overview_row(outcome) for outcome in outcomes],
        },
        "problems": list(problems),
        "sections": [
            _section(outcome, figures[outcome.label], choices[outcome.label])
            for outcome in outcomes
        ],
    }
    # "<" is escaped so that no text can end the script element that holds the data.
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    template = resources.files("storylab.reporting").joinpath("page.html").read_text("utf-8")
    if bundle is None:
        script = "<script>" + figure_script().replace("</script", "<\\/script") + "</script>"
    else:
        script = f'<script src="{bundle}"></script>'
    # The data last: a story may hold any text.
    return template.replace("@SCRIPT@", script).replace("@DATA@", data.replace("<", "\\u003c"))


def figure_script() -> str:
    """The libraries that draw the figures, as JavaScript: Vega, Vega-Lite and Vega-Embed."""
    # Its type stub asks for an argument that the function does not need.
    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return bundle


def _overview_row(outcome: Outcome) -> list[Any]:
    losses = outcome.baseline_of(outcome.conditions[0]).arm.losses
    return [
        {"text": section_title(outcome), "href": f"#{outcome.label}"},
        outcome.record.scale or "-",
        f"{float(np.mean(losses)):.4f}" if losses else "",
        headline(outcome),
    ]


def _section(
    outcome: Outcome, figures: Mapping[str, Spec], choices: Sequence[str]
) -> dict[str, Any]:
    record = outcome.record
    headings, rows = table_rows(outcome)
    effect_headings, effect_rows = effect_table(outcome)
    arms = list(dict.fromkeys(cell.arm.name for cell in outcome.cells))
    facts = [
        ["Purpose", record.purpose],
        ["Hypothesis", record.hypothesis],
        ["Scale", record.note],
        ["Plan", plan_text(outcome)],
        ["Choices", "; ".join(choices)],
        ["Factor", f"{factor_text(outcome)}; baseline: {outcome.baseline}"],
    ]
    return {
        "label": outcome.label,
        "title": section_title(outcome),
        "headline": headline(outcome),
        "facts": [fact for fact in facts if fact[1]],
        "repeat": repeat_command(outcome),
        "problems": list(outcome.problems),
        "conditions": list(outcome.conditions),
        "axes": _measured_axes(outcome),
        "arms": [{"name": name, "color": COLORS[i % len(COLORS)]} for i, name in enumerate(arms)],
        "figures": [[caption, spec] for caption, spec in figures.items()],
        "table": {"headings": headings, "rows": rows},
        "effects": {"headings": effect_headings, "rows": effect_rows},
        "observations": observations(outcome),
        "verdicts": [" | ".join(lines) for lines in verdicts_in_full(outcome)],
        "samples": _samples(outcome),
        "configs": [{"name": cell.name, "config": flat_config(cell)} for cell in outcome.cells],
    }


def _measured_axes(outcome: Outcome) -> dict[str, str]:
    """Quantities for the horizontal axis of curves: those that the machine could measure."""
    rows = curve_rows(outcome)
    return {key: title for key, title in AXES.items() if any(row[key] is not None for row in rows)}


def _samples(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{cell.name}, seed {cell.arm.finished[0].config.seed}",
            "samples": [
                {"prompt": s.prompt, "text": printable(s.text)}
                for s in cell.arm.finished[0].results.samples
            ],
        }
        for cell in outcome.cells
        if cell.arm.finished
    ]
