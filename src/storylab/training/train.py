"""Train a new run; ``resume.py`` continues one."""

from __future__ import annotations

from storylab.config import TrainConfig
from storylab.data.dataset import load_dataset
from storylab.record.folder import RunFolder
from storylab.record.stages import create_run
from storylab.training.checking import run_checks
from storylab.training.loop import fit
from storylab.training.observers import Observer, Observers
from storylab.training.ranks import ONE_PROCESS, Ranks
from storylab.training.setup import TrainingSetup, resolve


def train(config: TrainConfig, *observers: Observer, ranks: Ranks = ONE_PROCESS) -> RunFolder:
    """Train a model as ``config`` says, in a new run folder.

    Args:
        config: the run.
        observers: watch it, in the process that leads.
        ranks: the processes of the run, which all call this.

    Raises:
        UserError: data, device or folder cannot be used, a check has failed, or the disk is full.
        Interrupted: a signal stopped it; the run can be resumed.
        Diverged: loss or gradients are not finite.
    """
    watching = Observers(observers if ranks.leads else ())
    asked = config.compile is True
    config, precision = resolve(config, ranks)
    dataset = load_dataset(config.data_dir)
    dataset.require_window(config.block_size)
    setup = TrainingSetup(config, dataset, precision)
    setup = run_checks(setup, watching, compile_asked=asked)
    assert setup.config.out_dir is not None
    run = ranks.folder(setup.config.out_dir)
    if ranks.leads:
        create_run(setup.config, dataset, setup.identity())
    with ranks.hold(run.folder):
        return fit(setup, run, watching, ranks)
