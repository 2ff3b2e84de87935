"""The spread of the final loss over seeds of one recipe."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from storylab.errors import UserError
from storylab.experiments.comparison import Noise
from storylab.experiments.factors import changed_fields
from storylab.files import exists
from storylab.record.folder import CONFIG
from storylab.record.index import RunCache, run_folders
from storylab.record.run import Run, RunHead


def same_recipe(a: Run | RunHead, b: Run) -> bool:
    """Whether two runs differ in their seeds at most: the same config otherwise, and the same data."""
    return a.data.fingerprint == b.data.fingerprint and not changed_fields(a.config, b.config)


def noise_of(runs: Iterable[Run]) -> Noise | None:
    """Spread of final losses of one recipe over its seeds; None for fewer than two seeds, and where
    all are the same to the bit, as nothing is known then."""
    losses = list({run.seeds: run.loss for run in runs if run.finished}.values())
    if len(losses) < 2 or len(set(losses)) < 2:
        return None
    return Noise(float(np.mean(losses)), float(np.std(losses, ddof=1)), len(losses))


def noise_floor(run: Run, cache: RunCache | None = None) -> Noise | None:
    """Spread of the final loss over seeds: of the runs in the same folder with the same config, data and
    code."""
    found, _ = other_seeds(run, cache)
    return noise_of(found)


def other_seeds(run: Run, cache: RunCache | None = None) -> tuple[list[Run], list[str]]:
    """The run and those in the same folder with the same config (except seeds), data and code; and
    the faults of unreadable ones."""
    cache = cache or RunCache()
    found, problems = [run], []
    for folder in run_folders(run.folder.parent):
        try:
            if not exists(folder / CONFIG):
                continue
            if same_recipe(cache.head(folder), run):
                found.append(cache.load(folder))
        except UserError as error:
            problems.append(str(error))
    return [other for other in found if other.code_versions == run.code_versions], problems
