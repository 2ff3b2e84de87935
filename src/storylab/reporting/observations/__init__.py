"""Key observations: statements computed from the runs, each with its numbers.

A figure is measured unless the sentence says that it is predicted. To add observations for a
factor, write a function from an outcome to sentences in a new file, and enter it below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from storylab.experiments.outcome import Outcome
from storylab.reporting.observations.attention import windows_observations
from storylab.reporting.observations.expectation import expectation_text
from storylab.reporting.observations.length import length_observations
from storylab.reporting.observations.precision import precision_observations
from storylab.reporting.observations.rate import rate_observations
from storylab.reporting.observations.run import failures, run_observations
from storylab.reporting.observations.size import size_observations

BY_FACTOR: dict[str, Callable[[Outcome], Iterable[str]]] = {
    "attention": windows_observations,
    "size": size_observations,
    "length": length_observations,
    "learning_rate": rate_observations,
    "precision": precision_observations,
}


def observations(outcome: Outcome) -> list[str]:
    """Observations on an experiment's runs, a sentence or two each.

    First on a run of each baseline, then on the factor, on runs that failed, and on the hypothesis.
    """
    found: list[str] = []
    seen = set()
    for condition in outcome.conditions:
        cell = outcome.baseline_of(condition)
        if cell.arm.finished and cell.arm.finished[0].folder not in seen:
            seen.add(cell.arm.finished[0].folder)
            found += run_observations(cell.arm.finished[0], cell.name)
    if outcome.factor in BY_FACTOR:
        found += BY_FACTOR[outcome.factor](outcome)
    found += failures(outcome)
    return [*found, *(expectation_text(check) for check in outcome.expectations)]
