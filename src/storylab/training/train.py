"""Train a new run; ``resume.py`` continues one."""

from __future__ import annotations

from storylab.config import TrainConfig
from storylab.data.dataset import load_dataset
from storylab.files import exclusive
from storylab.record.folder import RunFolder
from storylab.record.stages import create_run
from storylab.training.checking import run_checks
from storylab.training.loop import fit
from storylab.training.observers import Observer, Observers
from storylab.training.setup import TrainingSetup, resolve


def train(config: TrainConfig, *observers: Observer) -> RunFolder:
    """Train a model as ``config`` says, in a new run folder.

    Raises:
        UserError: data, device or folder cannot be used, a check has failed, or the disk is full.
        Interrupted: a signal stopped it; the run can be resumed.
        Diverged: loss or gradients are not finite.
    """
    watching = Observers(observers)
    asked = config.compile is True
    config, precision = resolve(config)
    dataset = load_dataset(config.data_dir)
    dataset.require_window(config.block_size)
    setup = TrainingSetup(config, dataset, precision)
    setup = run_checks(setup, watching, compile_asked=asked)
    run = create_run(setup.config, dataset, setup.identity())
    with exclusive(run.folder):
        return fit(setup, run, watching)
