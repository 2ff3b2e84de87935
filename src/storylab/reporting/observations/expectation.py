"""A hypothesis and the numbers that it was checked against."""

from __future__ import annotations

import math

from storylab.experiments.experiment import METRICS
from storylab.experiments.factors import under
from storylab.experiments.outcome import Checked


def expectation_text(check: Checked) -> str:
    """An expectation, the number it was checked against, and by how much it was met or missed."""
    e = check.expectation
    title = f"Hypothesis ({under(e.arm, check.condition)}): {e.text}"
    if check.value is None:
        return f"{title} - not measured."
    span = ""
    if check.low is not None and check.high is not None:
        span = f" (95 % CI {check.low:.4g} to {check.high:.4g})"
    value = f"{check.value:.4g}" if math.isfinite(check.value) else "none is seen coming"
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in (("at least", e.at_least), ("at most", e.at_most))
        if bound is not None
    ]
    missed = check.missed_bound
    by = f", missed by {abs(check.value - missed):.4g}" if missed is not None else ""
    if check.met is None:
        answer, by = "can't tell, the bound is within the interval", ""
    else:
        answer = "met" if check.met else "not met"
    if not math.isfinite(check.value):
        by = ""
    return (
        f"{title} - {answer}: {METRICS[e.metric]}: {value}{span}, expected "
        f"{' and '.join(bounds)}{by}."
    )
