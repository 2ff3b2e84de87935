"""The choices behind an experiment: arms that were tried on its data, and runs that were rolled again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from storylab.data.tally import plural
from storylab.experiments.attempts import SET_ASIDE
from storylab.experiments.neighbors import named
from storylab.experiments.outcome import Outcome
from storylab.experiments.records import FolderCache
from storylab.experiments.selection import records_on, selection_line, selection_of
from storylab.experiments.statistics import typical_deviation
from storylab.files import reading


def choices(outcomes: Sequence[Outcome], runs: Path, cache: FolderCache) -> dict[str, list[str]]:
    """Lines on the choices behind each experiment, by its label.

    Args:
        outcomes: the experiments.
        runs: the folder with their records and runs.
        cache: runs and records that have been read already.

    Raises:
        UserError: the folder cannot be read.
    """
    with reading(runs):
        folders = sorted(folder.name for folder in runs.iterdir())
    tried = {
        data: [record for _, record in records_on(runs, data, cache)]
        for data in {_fingerprint(outcome) for outcome in outcomes} - {""}
    }
    found = {}
    for outcome in outcomes:
        lines = list(_rolled_again(outcome, folders))
        chosen = outcome.comparisons and not outcome.effects
        if chosen and (known := tried.get(_fingerprint(outcome))):
            line = selection_line(selection_of(known), _spread(outcome))
            lines.insert(
                0, f"{line} ({plural(len(known), 'experiment')} on this data in this folder)"
            )
        found[outcome.label] = lines
    return found


def _fingerprint(outcome: Outcome) -> str:
    """Of the data set; empty without runs."""
    return next((run.data.fingerprint for run in outcome.runs), "")


def _spread(outcome: Outcome) -> float | None:
    """The typical standard deviation of a paired difference over seeds, if it is known."""
    samples = []
    for condition in outcome.conditions:
        baseline = {run.seeds: run.loss for run in outcome.baseline_of(condition).arm.finished}
        for cell in outcome.arms(condition):
            if cell.arm.name != outcome.baseline:
                pairs = [run for run in cell.arm.finished if run.seeds in baseline]
                samples.append([run.loss - baseline[run.seeds] for run in pairs])
    return typical_deviation(samples)


def _rolled_again(outcome: Outcome, folders: Sequence[str]) -> Iterator[str]:
    """A line on the experiment's runs of which an earlier one was set aside."""
    listed = {name for cell in outcome.record.cells for name in cell.runs.values()}
    aside = [f for f in folders if SET_ASIDE.search(f) and SET_ASIDE.sub("", f) in listed]
    if aside:
        count = plural(len(aside), "earlier run")
        yield f"Re-rolled: {count} set aside, not counted: {named(aside)}"
