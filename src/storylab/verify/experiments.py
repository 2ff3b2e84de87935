"""Experiments: their registered plans, and the arms that they recorded as settled, from their runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from storylab.experiments.effect_words import verdict_lines
from storylab.experiments.factors import qualified_name
from storylab.experiments.outcome import Outcome, load_outcome
from storylab.experiments.records import FolderCache
from storylab.experiments.registered_plan import canonical
from storylab.files import exists, read_text
from storylab.reporting.markdown import plain
from storylab.reporting.report import LOG_FILE
from storylab.verify.findings import Difference, Finding, Gap, unequal


@dataclass(frozen=True)
class ExperimentSubject:
    """An experiment to verify: its record, and runs that have been read."""

    folder: Path
    cache: FolderCache

    @cached_property
    def outcome(self) -> Outcome:
        """The outcome that its runs give.

        Raises:
            UserError: the record is damaged.
        """
        return load_outcome(self.folder, self.cache)


def plan_faults(subject: ExperimentSubject) -> Iterator[Finding]:
    """A registered plan that is not the one whose hash was registered."""
    registered = subject.outcome.record.registered
    if registered is None:
        yield Gap("its plan was not registered (record of an earlier version)")
        return
    digest = hashlib.sha256(canonical(registered.plan).encode()).hexdigest()
    yield from unequal(
        subject.folder.name, "sha256 of the plan", registered.sha256, digest, "the plan"
    )


def run_faults(subject: ExperimentSubject) -> Iterator[Finding]:
    """Runs that the experiment lists and that are missing or damaged."""
    for problem in subject.outcome.problems:
        yield Gap(problem)


def verdict_faults(subject: ExperimentSubject) -> Iterator[Finding]:
    """Arms that a look recorded as settled, and that the runs do not settle."""
    outcome = subject.outcome
    settled = {qualified_name(arm, condition) for condition, arm in outcome.settled_arms()}
    for look in outcome.record.looks_taken:
        for name in sorted(set(look.settled) - settled):
            yield Difference(
                subject.folder.name,
                f"the look at {look.seeds} seeds settled '{name}', which its runs do not",
            )


def report_faults(subject: ExperimentSubject) -> Iterator[Finding]:
    """Verdicts of the report next to the runs that are not those of the runs."""
    report = subject.folder.parent.parent / "report" / LOG_FILE
    if not exists(report):
        return
    lines, outcome = set(read_text(report).splitlines()), subject.outcome
    if not any(line.startswith("#") and outcome.record.title in line for line in lines):
        yield Gap(f"{report} has no section on it yet")
        return
    for verdict in verdict_lines(outcome):
        if f"- {plain(verdict)}" not in lines:
            yield Difference(
                f"report/{LOG_FILE}",
                f"{report} is older than the runs, or has been altered: it does not have the verdict "
                f"'{verdict}'; `storylab experiment report` writes it again",
            )
