"""The runs that make up an experiment: every cell with every seed, and their folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from storylab.config import TrainConfig, recipe_digest
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments.experiment import Cell, Experiment
from storylab.experiments.factors import qualified_name
from storylab.experiments.matching import equally_compiled
from storylab.experiments.records import FolderCache
from storylab.record.provenance import code_sha256, representative
from storylab.training.setup import resolve_device


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment: an arm under a condition, a seed, and the run folder.

    Methods that begin with ``read`` read the run folder.
    """

    cell: Cell
    seed: int
    folder: Path
    cache: FolderCache = field(default_factory=FolderCache, compare=False, repr=False)
    """Runs and records that have been read; shared by the runs of a plan."""

    @property
    def config(self) -> TrainConfig:
        """The config to train with."""
        return dataclasses.replace(
            self.cell.config, seed=self.seed, data_seed=self.seed, out_dir=self.folder
        )

    @property
    def label(self) -> str:
        """Arm, condition and seed, for the user."""
        return f"{qualified_name(self.cell.arm, self.cell.condition)}, seed {self.seed}"

    @property
    def tokens(self) -> int:
        """Tokens that the whole run trains on."""
        return self.config.total_tokens

    def read_state(self) -> str:
        """``finished``, ``diverged``, ``failed``, ``unfinished``, ``new``, or ``damaged``."""
        return self.read_state_and_reason()[0]

    def read_state_and_reason(self) -> tuple[str, str]:
        """The state, and why the run failed, diverged or is damaged.

        A run that has ended is not trained again, so all its files are checked.
        """
        return self.cache.state(self.folder)

    def read_is_by_other_code(self) -> bool:
        """Whether another version of the code that decides its numbers trained the run."""
        try:
            stage = self.cache.load(self.folder).environment
        except UserError:
            return False
        return representative(stage.code_sha256) != representative(code_sha256())


def require_runnable(experiment: Experiment) -> None:
    """Raise a UserError if the experiment waits for something that storylab does not have yet."""
    if experiment.waits_for:
        raise UserError(f"{experiment.name} cannot run yet: it waits for {experiment.waits_for}")


@dataclass(frozen=True)
class ResolvedCell:
    """A cell with device and data filled in, as far as this machine can run it."""

    cell: Cell
    name: str
    """What the names of its run folders begin with."""
    runnable: bool
    """Whether this machine has its device and precision; if not, they are as the file has them."""

    def folder_name(self, seed: int) -> str:
        """Name of the folder of its run with ``seed``."""
        return f"{self.name}-s{seed}"


def resolved_cells(
    experiment: Experiment, dataset: Dataset, only: Collection[str] = ()
) -> list[ResolvedCell]:
    """Every cell with device and data filled in.

    Raises:
        UserError: the experiment cannot run yet, or this machine lacks the device or precision of
            one of its arms, or of those in ``only``.
    """
    require_runnable(experiment)
    cells = []
    for cell in _equally_compiled_here(experiment):
        dataset.require_window(cell.config.block_size)
        config, runnable = dataclasses.replace(cell.config, data_dir=dataset.folder), True
        try:
            config, _ = resolve_device(config)
        except UserError as error:
            if not only or cell.arm in only:
                raise UserError(f"arm '{cell.arm}': {error}; --only runs the other arms") from error
            runnable = False
        name = f"{config.preset}-{recipe_digest(config, dataset.fingerprint)}"
        # If compiling fails, a run stops only if the user asked for compiling.
        config = dataclasses.replace(config, compile=cell.config.compile)
        cells.append(ResolvedCell(dataclasses.replace(cell, config=config), name, runnable))
    return cells


def _equally_compiled_here(experiment: Experiment) -> Iterable[Cell]:
    """The cells, all of them uncompiled if one is too short to be compiled on a CUDA device that they
    use."""
    names = {cell.config.device for cell in experiment.cells}
    cuda = "auto" in names and torch.cuda.is_available()
    if cuda or any(name.startswith("cuda") for name in names):
        return equally_compiled(experiment, "cuda")
    return experiment.cells


def plan_runs(
    experiment: Experiment,
    dataset: Dataset,
    runs: Path,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
    cache: FolderCache | None = None,
) -> list[PlannedRun]:
    """The runs of an experiment, in order: seed by seed, so that every arm has a result early.

    Args:
        experiment: all of it, with its cells.
        dataset: prepared data.
        runs: the folder for the run folders.
        seeds: by default those of the experiment.
        only: arms to train; by default all.
        cache: runs and records that have been read; the planned runs share it.

    Raises:
        UserError: the experiment cannot run yet, ``only`` names no arm, or this machine lacks
            the device or precision.
    """
    if unknown := set(only) - set(experiment.arms):
        raise UserError(
            f"there is no arm {', '.join(sorted(unknown))}: use one of {', '.join(experiment.arms)}"
        )
    cells, cache = resolved_cells(experiment, dataset, only), cache or FolderCache()
    return [
        PlannedRun(found.cell, seed, runs / found.folder_name(seed), cache)
        for seed in seeds or experiment.seeds
        for found in cells
        if not only or found.cell.arm in only
    ]
