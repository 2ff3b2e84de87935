"""Confirm chosen arms: on seeds that no search has used, with strict error control, on the test split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments.experiment import MOST_SEEDS, Experiment
from storylab.experiments.leases import hold_records
from storylab.experiments.openings import OpeningLine, OpeningLog
from storylab.experiments.recording import record_path
from storylab.experiments.records import FolderCache
from storylab.experiments.registration import now
from storylab.experiments.selection import recorded_openings, used_seeds
from storylab.files import exists
from storylab.record.experiment_schema import ExperimentRecord, Opening

FEWEST_SEEDS = 5


def confirmation(
    experiment: Experiment,
    dataset: Dataset,
    runs: Path,
    only: Sequence[str],
    seeds: int | None,
    cache: FolderCache,
) -> Experiment:
    """The experiment that confirms arms of ``experiment``: one look, own variances, seeds of its own.

    The seeds are fixed by the first call: a later one reads them from the record.

    Args:
        experiment: the search.
        dataset: its data.
        runs: the folder for the run folders.
        only: arms to confirm; by default those of an earlier call, or the only one besides the baseline.
        seeds: number of seeds; by default that of an earlier call, or 5.
        cache: runs and records that have been read.

    Raises:
        UserError: the data has no test split, an arm is unknown or none is chosen, there are too few seeds,
            or the record of an earlier call cannot be read.
    """
    require_test(dataset)
    confirmed = dataclasses.replace(experiment, stage="confirm", variance="own")
    path = record_path(confirmed, runs)
    earlier = cache.record(path) if exists(path) else None
    confirmed = _with_arms(confirmed, _chosen_arms(experiment, only, earlier))
    taken = tuple(earlier.seeds) if earlier else ()
    count = _count_of(seeds, taken)
    if len(taken) < count:
        used = {*used_seeds(runs, dataset.fingerprint, cache), *taken}
        taken += _unsearched_seeds(experiment, used, count - len(taken))
    return dataclasses.replace(confirmed, seeds=taken[:count], looks=(count,))


def _with_arms(experiment: Experiment, arms: tuple[str, ...]) -> Experiment:
    """The experiment with some of its arms alone."""
    return dataclasses.replace(
        experiment,
        arms=arms,
        expectations=tuple(entry for entry in experiment.expectations if entry.arm in arms),
        cells=tuple(cell for cell in experiment.cells if cell.arm in arms),
    )


def _count_of(seeds: int | None, taken: tuple[int, ...]) -> int:
    """The number of seeds that is asked for, or that of an earlier call, or 5."""
    count = (len(taken) or FEWEST_SEEDS) if seeds is None else seeds
    if not FEWEST_SEEDS <= count <= MOST_SEEDS:
        raise UserError(f"seeds is {count}: it must be {FEWEST_SEEDS} to {MOST_SEEDS:,} to confirm")
    return count


def _unsearched_seeds(experiment: Experiment, used: set[int], count: int) -> tuple[int, ...]:
    """The first ``count`` seeds that are neither ``used`` nor planned for the search."""
    searched = experiment.first_seeds(max(len(experiment.seeds), *experiment.looks))
    return fresh_seeds({*used, *searched}, max(experiment.seeds) + 1, count)


def require_test(dataset: Dataset) -> None:
    """Raise a UserError that says how to get a test split, if a data set has none."""
    if dataset.has_test:
        return
    if dataset.manifest.get("test_origin") == "none":
        remedy = (
            "its validation stories are too few to be divided: prepare more, or give --test FILES"
        )
    else:
        remedy = (
            "an earlier version prepared it: prepare it again into another --out, and search there"
        )
    raise UserError(f"{dataset.folder} has no test split to confirm on: {remedy}")


def fresh_seeds(used: set[int], first: int, count: int) -> tuple[int, ...]:
    """The first ``count`` numbers from ``first`` on that are not in ``used``."""
    found: list[int] = []
    while len(found) < count:
        if first not in used:
            found.append(first)
        first += 1
    return tuple(found)


def _chosen_arms(
    experiment: Experiment, only: Sequence[str], earlier: ExperimentRecord | None
) -> tuple[str, ...]:
    """The baseline and the arms to confirm, in the order of the file."""
    if unknown := set(only) - set(experiment.arms):
        raise UserError(
            f"there is no arm {', '.join(sorted(unknown))}: use one of {', '.join(experiment.arms)}"
        )
    if experiment.factorial:
        if only:
            raise UserError(
                "a factorial experiment is confirmed whole, without --only: its effects need all cells"
            )
        return experiment.arms
    others = [arm for arm in experiment.arms if arm != experiment.baseline]
    chosen = set(only) or (set(earlier.arms) if earlier else set())
    if not chosen and len(others) == 1:
        chosen = set(others)
    chosen.discard(experiment.baseline)
    if not chosen & set(others):
        raise UserError(
            f"say which arms to confirm: --only ARM, one or more of {', '.join(others)}"
        )
    return tuple(arm for arm in experiment.arms if arm in chosen or arm == experiment.baseline)


def note_opening(path: Path, seeds: int, fingerprint: str, cache: FolderCache) -> int:
    """Note that losses on the test split are shown: in a record, and in the folder's log of openings.

    Args:
        path: file of the record.
        seeds: number of seeds whose losses are shown.
        fingerprint: of the data set.
        cache: runs and records that have been read.

    Returns:
        How often the test split of the data set was opened before, over all experiments in the folder.

    Raises:
        UserError: the record cannot be read or written.
    """
    with hold_records(path.parent.parent) as lease:
        log = OpeningLog.read(path.parent)
        recorded = recorded_openings(path.parent.parent, fingerprint, cache)
        opening = Opening(time=now(), seeds=seeds)
        lease.renew()
        log.append(OpeningLine(opening.time, fingerprint, path.stem, seeds))
        openings = [*cache.record(path).openings, opening]
        cache.save_record(path, {"openings": [structs.asdict(entry) for entry in openings]})
    # The log knows of records that were deleted.
    return max(recorded, log.count(fingerprint))


def openings_line(count: int) -> str:
    """How often the test split was opened before."""
    if not count:
        return "The test split of this data was not opened before"
    times = "once" if count == 1 else f"{count} times"
    return f"The test split of this data was opened {times} before"
