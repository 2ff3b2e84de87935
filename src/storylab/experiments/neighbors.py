"""Runs of the same recipes next to those that were given to ``storylab compare``, but not given."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from storylab.data.tally import plural
from storylab.errors import UserError
from storylab.experiments.attempts import SET_ASIDE
from storylab.experiments.comparison import Arm
from storylab.experiments.noise import same_recipe
from storylab.files import exists
from storylab.record.folder import CONFIG, SUMMARY, RunFolder
from storylab.record.index import RunCache, run_folders
from storylab.record.provenance import representative
from storylab.record.run import RunHead

# Folders that are named in a line before "and N more".
MOST_NAMED = 4


@dataclass
class Neighbors:
    """Runs of one arm's recipe that have ended and were not given.

    Attributes:
        arm: name of the arm.
        given: seeds of the given runs, of weights and data order.
        others: folders of runs with other seeds, by those seeds.
        repeats: folders of runs with the same seeds as another, and of runs that were set aside.
        other_code: folders of runs by other versions of the code.
    """

    arm: str
    given: set[tuple[int, int]]
    others: dict[tuple[int, int], Path] = field(default_factory=dict)
    repeats: list[Path] = field(default_factory=list)
    other_code: list[Path] = field(default_factory=list)

    @property
    def found(self) -> bool:
        """Whether there is any."""
        return bool(self.others or self.repeats or self.other_code)

    @property
    def reason(self) -> str | None:
        """Why a verdict on the given runs is exploratory; None if no other seed was found."""
        if not self.others:
            return None
        seeds = plural(len(self.given) + len(self.others), "seed")
        return f"chosen by hand: {len(self.given)} of {seeds} of {self.arm}"

    @property
    def lines(self) -> list[str]:
        """The runs that were found, a line for each kind."""
        kinds = (
            (list(self.others.values()), "other seeds"),
            (self.repeats, "the same seeds again, or set aside, not counted"),
            (self.other_code, "other versions of the code, not counted"),
        )
        return [
            f"not given, of the recipe of {self.arm}: {named(list(map(str, folders)))} ({kind})"
            for folders, kind in kinds
            if folders
        ]


def named(folders: Sequence[str]) -> str:
    """The first few folders, and the number of the rest."""
    more = len(folders) - MOST_NAMED
    names = ", ".join(folders[:MOST_NAMED])
    return f"{names} and {more} more" if more > 0 else names


def find_neighbors(arms: Sequence[Arm], cache: RunCache) -> list[Neighbors]:
    """Look for runs of the arms' recipes in all folders of their runs.

    Of every run there, only config and data are read; of runs of these recipes also the environment. Runs
    that have not ended, and those that cannot be read, are left out.

    Args:
        arms: each with one run or more.
        cache: runs that have been read already.

    Returns:
        One entry for every arm, in order.
    """
    found = [Neighbors(arm.name, {run.seeds for run in arm.runs}) for arm in arms]
    codes = [set().union(*(run.code_versions for run in arm.runs)) for arm in arms]
    for folder, head in _others(arms, cache):
        for arm, code, neighbors in zip(arms, codes, found, strict=True):
            if same_recipe(head, arm.runs[0]):
                with contextlib.suppress(UserError):
                    _add(neighbors, folder, head, code)
    return found


def _others(arms: Sequence[Arm], cache: RunCache) -> Iterator[tuple[Path, RunHead]]:
    """Runs that have ended, in the folders of the arms' runs, and are none of them."""
    given = {os.path.realpath(run.folder) for arm in arms for run in arm.runs}
    parents = {os.path.realpath(r.folder.parent): r.folder.parent for arm in arms for r in arm.runs}
    for parent in parents.values():
        for folder in run_folders(parent):
            with contextlib.suppress(UserError):
                ended = exists(folder / CONFIG) and exists(folder / SUMMARY)
                if ended and os.path.realpath(folder) not in given:
                    yield folder, cache.head(folder)


def _add(neighbors: Neighbors, folder: Path, head: RunHead, code: set[str]) -> None:
    """File a run under what sets it apart."""
    seeds = head.config.seed, head.config.resolved_data_seed
    environment = RunFolder(folder).read_environment()
    stages = (environment, *environment.resumed)
    if SET_ASIDE.search(folder.name):
        neighbors.repeats.append(folder)
    elif not {representative(stage.code_sha256) for stage in stages} <= code:
        neighbors.other_code.append(folder)
    elif seeds in neighbors.given or seeds in neighbors.others:
        neighbors.repeats.append(folder)
    else:
        neighbors.others[seeds] = folder
