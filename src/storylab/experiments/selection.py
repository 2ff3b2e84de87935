"""The history of a data set in a folder of runs: arms tried, seeds used, openings of the test split."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

from scipy import integrate, stats

from storylab.errors import UserError
from storylab.experiments.experiment import counted_up
from storylab.experiments.records import FolderCache, experiment_records
from storylab.files import exists
from storylab.record.experiment_schema import ExperimentRecord
from storylab.record.folder import CONFIG
from storylab.record.index import run_folders


@dataclass(frozen=True)
class Selection:
    """The arms that one was chosen from.

    Attributes:
        arms: recipes that experiments compared with a baseline on the data, each counted once.
        seeds: seeds that they were trained with, in the median.
    """

    arms: int
    seeds: int

    def best_by_chance(self, spread: float) -> float:
        """Nats by which the best of that many equal arms looks better than the baseline.

        Args:
            spread: standard deviation over seeds of an arm's paired difference. Half of its square is the
                baseline's noise, which all arms share and which favors none.
        """
        if not self.seeds:
            return 0.0
        return expected_largest(self.arms) * spread / math.sqrt(2 * self.seeds)


def expected_largest(count: int) -> float:
    """The expected largest of ``count`` independent standard normal values; 0 for fewer than two."""
    if count < 2:
        return 0.0

    def density(x: float) -> float:
        log = math.log(count) + stats.norm.logpdf(x) + (count - 1) * stats.norm.logcdf(x)
        return x * math.exp(log)

    return float(integrate.quad(density, -12.0, 12.0, limit=200)[0])


def records_on(
    runs: Path, fingerprint: str, cache: FolderCache
) -> Iterator[tuple[Path, ExperimentRecord]]:
    """The readable records of experiments on a data set, with those that do not say on which."""
    for path in experiment_records(runs):
        with contextlib.suppress(UserError):  # the report names a damaged one
            record = cache.record(path)
            if _fingerprint(record, runs, cache) in (fingerprint, None):
                yield path, record


def _fingerprint(record: ExperimentRecord, runs: Path, cache: FolderCache) -> str | None:
    if record.registered is not None:
        changed = [change.after for change in record.amendments if change.what == "data"]
        return str([record.registered.plan.get("data"), *changed][-1])
    for cell in record.cells:
        for name in cell.runs.values():
            with contextlib.suppress(UserError):
                return cache.head(runs / name).data.fingerprint
    return None


def selection_on(runs: Path, fingerprint: str, cache: FolderCache) -> Selection:
    """The arms that search experiments in a folder of runs have tried on a data set."""
    return selection_of(record for _, record in records_on(runs, fingerprint, cache))


def selection_of(records: Iterable[ExperimentRecord]) -> Selection:
    """The arms that the search experiments among ``records`` have tried."""
    seeds: dict[str, set[str]] = {}
    for record in records:
        for cell in record.cells:
            if record.stage == "search" and cell.arm != record.baseline:
                for seed, name in cell.runs.items():
                    seeds.setdefault(name.removesuffix(f"-s{seed}"), set()).add(seed)
    return Selection(len(seeds), median_low(map(len, seeds.values())) if seeds else 0)


def selection_line(selection: Selection, spread: float | None) -> str:
    """Say what an arm was chosen from, and what that choice alone would bring.

    Args:
        selection: the arms that were tried.
        spread: standard deviation over seeds of an arm's paired difference, if it is known.
    """
    arms = "1 arm" if selection.arms == 1 else f"{selection.arms} arms"
    seeds = "1 seed" if selection.seeds == 1 else f"{selection.seeds} seeds"
    line = f"Chosen among {arms} on {seeds}"
    if spread is None or selection.arms < 2:
        return line
    gain = selection.best_by_chance(spread)
    return f"{line}: the best of as many equal arms would look better by {gain:.4f} nats"


def used_seeds(runs: Path, fingerprint: str, cache: FolderCache) -> set[int]:
    """Seeds that any run in a folder has used with a data set, or that a recorded plan reserves for it."""
    used: set[int] = set()
    for _, record in records_on(runs, fingerprint, cache):
        used |= {int(seed) for cell in record.cells for seed in cell.runs}
        if record.seeds:
            count = max(len(record.seeds), *record.looks, 0)
            used.update(counted_up(record.seeds, count))
    for folder in run_folders(runs) if exists(runs) else ():
        try:
            head = cache.head(folder) if exists(folder / CONFIG) else None
        except UserError:
            head = None
        if head is None:  # it failed early or is damaged: its name alone tells
            named = re.search(r"-s(\d{1,19})(\.old\d+)?$", folder.name, re.ASCII)
            used |= {int(named[1])} if named else set()
        elif head.data.fingerprint == fingerprint:
            used |= {head.config.seed, head.config.resolved_data_seed}
    return used


def recorded_openings(runs: Path, fingerprint: str, cache: FolderCache) -> int:
    """How often the test split of a data set was opened, by the records in a folder of runs."""
    return sum(len(record.openings) for _, record in records_on(runs, fingerprint, cache))
