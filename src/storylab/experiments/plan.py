"""The runs that make up an experiment: every cell with every seed, their folders, and their record."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from storylab import config as configs
from storylab.config import TrainConfig, recipe_digest
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments.experiment import Cell, Experiment
from storylab.experiments.factors import under
from storylab.files import make_folder, read_record, write_json
from storylab.record.index import RunCache
from storylab.record.provenance import code_sha256, representative
from storylab.record.schema import ExperimentRecord
from storylab.training.setup import resolve_device

# The folder in RUNS with one file for each experiment.
EXPERIMENTS = "experiments"


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment: an arm under a condition, a seed, and the run folder.

    Methods that begin with ``read`` read the run folder.
    """

    cell: Cell
    seed: int
    folder: Path
    cache: RunCache = field(default_factory=RunCache, compare=False, repr=False)
    """Runs that have been read; shared by the runs of a plan."""

    @property
    def config(self) -> TrainConfig:
        """The config to train with."""
        return dataclasses.replace(
            self.cell.config, seed=self.seed, data_seed=self.seed, out_dir=self.folder
        )

    @property
    def label(self) -> str:
        """Arm, condition and seed, for the user."""
        return f"{under(self.cell.arm, self.cell.condition)}, seed {self.seed}"

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


def resolved_cells(
    experiment: Experiment, dataset: Dataset, only: Collection[str] = ()
) -> list[tuple[Cell, str]]:
    """Every cell with device and data filled in, and the name that its runs' folders begin with.

    Raises:
        UserError: the experiment cannot run yet, or this machine lacks the device or precision of
            one of its arms, or of those in ``only``.
    """
    require_runnable(experiment)
    cells = []
    for cell in experiment.cells:
        dataset.require_window(cell.config.block_size)
        config = dataclasses.replace(cell.config, data_dir=dataset.folder)
        try:
            config, _ = resolve_device(config)
        except UserError as error:
            if not only or cell.arm in only:
                raise UserError(f"arm '{cell.arm}': {error}; --only runs the other arms") from error
        name = f"{config.preset}-{recipe_digest(config, dataset.fingerprint)}"
        # If compiling fails, a run stops only if the user asked for compiling.
        config = dataclasses.replace(config, compile=cell.config.compile)
        cells.append((dataclasses.replace(cell, config=config), name))
    return cells


def plan_runs(
    experiment: Experiment,
    dataset: Dataset,
    runs: Path,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
) -> list[PlannedRun]:
    """The runs of an experiment, in order: seed by seed, so that every arm has a result early.

    Args:
        experiment: all of it, with its cells.
        dataset: prepared data.
        runs: the folder for the run folders.
        seeds: by default those of the experiment.
        only: arms to train; by default all.

    Raises:
        UserError: the experiment cannot run yet, ``only`` names no arm, or this machine lacks
            the device or precision.
    """
    if unknown := set(only) - set(experiment.arms):
        raise UserError(
            f"there is no arm {', '.join(sorted(unknown))}: use one of {', '.join(experiment.arms)}"
        )
    cells, cache = resolved_cells(experiment, dataset, only), RunCache()
    return [
        PlannedRun(cell, seed, runs / f"{name}-s{seed}", cache)
        for seed in seeds or experiment.seeds
        for cell, name in cells
        if not only or cell.arm in only
    ]


def write_record(
    experiment: Experiment, dataset: Dataset, planned: Sequence[PlannedRun], runs: Path
) -> Path:
    """Write which runs make up the experiment; comparison and report read it. Returns the file.

    Runs that an earlier call planned and this one leaves out stay listed while their arm is the same.
    """
    path = runs / EXPERIMENTS / f"{experiment.label}.json"
    make_folder(path.parent)
    values = dataclasses.asdict(experiment)
    del values["data"], values["cells"]
    before = _read_recorded_runs(path)
    values["cells"] = []
    arms = {run.cell.arm for run in planned}
    for cell, name in resolved_cells(experiment, dataset, arms):
        key = (cell.condition, cell.arm)
        seeds = {run.seed for run in planned if (run.cell.condition, run.cell.arm) == key}
        seeds |= {
            seed for seed, folder in before.get(key, {}).items() if folder == f"{name}-s{seed}"
        }
        values["cells"].append(
            {
                "condition": cell.condition,
                "arm": cell.arm,
                "config": configs.to_dict(cell.config),
                "runs": {str(seed): f"{name}-s{seed}" for seed in sorted(seeds)},
            }
        )
    write_json(path, values)
    return path


def _read_recorded_runs(path: Path) -> dict[tuple[str, str], dict[int, str]]:
    """Folders by seed of every cell of an earlier record; empty if there is none that can be read."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    with contextlib.suppress(UserError):
        for cell in read_record(path, ExperimentRecord).cells:
            runs = {int(s): folder for s, folder in cell.runs.items() if s.isdecimal()}
            found[cell.condition, cell.arm] = runs
    return found
