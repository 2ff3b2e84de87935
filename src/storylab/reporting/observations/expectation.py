"""A hypothesis and the numbers that it was checked against."""

from __future__ import annotations

from storylab.experiments.curves import HORIZON
from storylab.experiments.experiment import METRICS
from storylab.experiments.factors import qualified_name
from storylab.experiments.measures import Checked

# Why a number is missing, where it is no measurement.
NOT_KNOWN = {"plateau_iteration": f"not predicted, or beyond {HORIZON} times the run"}


def expectation_text(check: Checked) -> str:
    """An expectation, the number it was checked against, and by how much it was met or missed."""
    e = check.expectation
    title = f"Hypothesis ({qualified_name(e.arm, check.condition)}): {e.text}"
    if check.value is None:
        return f"{title} - {NOT_KNOWN.get(e.metric, 'not measured')}."
    span = ""
    if check.low is not None and check.high is not None:
        span = f" (95 % CI {check.low:.4g} to {check.high:.4g})"
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
    return (
        f"{title} - {answer}: {METRICS[e.metric]}: {check.value:.4g}{span}, expected "
        f"{' and '.join(bounds)}{by}."
    )
