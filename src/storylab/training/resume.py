"""Continue a run, or refuse to where the result would not be the run's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from msgspec import UNSET

from storylab.compiler import missing_for_compiling
from storylab.config import FIELDS, TrainConfig, differences, flat
from storylab.errors import UserError
from storylab.optim.schedule import learning_rate, telling_iterations
from storylab.precision.edit import find_recipe
from storylab.record.folder import RunFolder, open_run
from storylab.record.provenance import current_stage, representative
from storylab.record.stages import truncate_to
from storylab.training.checking import run_checks
from storylab.training.loop import fit
from storylab.training.observers import Observer, Observers
from storylab.training.precision import ComputePolicy, choose_device
from storylab.training.ranks import ONE_PROCESS, Ranks
from storylab.training.setup import TrainingSetup, resolve_device


def resume(
    folder: Path,
    wanted: TrainConfig | None = None,
    *observers: Observer,
    ranks: Ranks = ONE_PROCESS,
) -> RunFolder:
    """Continue the run in ``folder`` to the same bits as if it had never stopped.

    Args:
        folder: the run folder.
        wanted: config to continue with, by default the run's own. It may differ in folders and in
            how often to print. It may also differ in ``max_iters`` if the learning rates of the
            iterations so far stay the same and nothing depends on a share of the run.
        observers: watch it, in the process that leads.
        ranks: the processes of the run, which all call this; another number of them gives other bits.

    Raises:
        UserError: other data, an incompatible config, a damaged checkpoint, or a check of this machine
            has failed; nothing is changed.
        Interrupted, Diverged: as in training.
    """
    run = open_run(folder)
    watching = Observers(observers if ranks.leads else ())
    with ranks.hold(folder):
        return _resume(run, wanted or run.read_config(), watching, ranks)


def _resume(run: RunFolder, wanted: TrainConfig, observers: Observers, ranks: Ranks) -> RunFolder:
    stored = run.read_config()
    config, precision, missing = _resolved(run, stored, wanted)
    _check_shares(stored, config)
    ranks.require(config, precision)
    dataset = run.load_data(config.data_dir)
    setup = TrainingSetup(config, dataset, precision)
    fault = setup.restore(run)
    done = setup.progress.next_iteration
    _check_learning_rates(stored, config, done)
    summary = run.read_summary()
    finished = summary and (summary.status, summary.iterations) == ("finished", done)
    if finished and done > config.max_iters:
        observers.line(
            f"{run.folder} is finished; a larger --max_iters goes on from it where the schedule "
            "permits (during warm-up, or --schedule constant)"
        )
        return run
    if missing is not None:
        observers.line(
            f"This machine lacks {missing}: training goes on uncompiled; bits may differ"
        )
    if fault is not None:
        observers.line(f"{fault}; going on from the checkpoint before it, of iteration {done}")
    for note in _notes(run, stored, config, done):
        observers.line(note)
    setup = run_checks(setup, observers, run)
    ranks.any(False)  # all have read the run before it changes
    run = ranks.folder(run.folder)
    if fault is not None and run.writes:
        os.replace(run.checkpoint("previous"), run.checkpoint("last"))
    truncate_to(run, done, setup.config, setup.findings())
    return fit(setup, run, observers, ranks)


def _resolved(
    run: RunFolder, stored: TrainConfig, wanted: TrainConfig
) -> tuple[TrainConfig, ComputePolicy, str | None]:
    """The config to go on with, its precision here, and the lack for which it is uncompiled, if any.

    Raises:
        UserError: the run cannot go on so, or not on this machine.
    """
    _require_device(run, stored)
    wanted = dataclasses.replace(wanted, out_dir=run.folder)
    if wanted.compile is None:
        wanted = dataclasses.replace(wanted, compile=stored.compile)
    missing = None
    if wanted.compile is True:
        missing = missing_for_compiling(choose_device(wanted.device).type)
    here = wanted if missing is None else dataclasses.replace(wanted, compile=False)
    try:
        config, precision = resolve_device(here)
    except UserError as error:
        raise UserError(
            f"{run.folder} goes on with its own config alone, and cannot here: {error}"
        ) from error
    _check_config(stored, dataclasses.replace(config, compile=wanted.compile))
    return config, precision, missing


def _notes(run: RunFolder, stored: TrainConfig, config: TrainConfig, done: int) -> Iterator[str]:
    """Lines for the user before the run goes on."""
    if config.max_iters != stored.max_iters:
        yield (
            f"max_iters {stored.max_iters} -> {config.max_iters}: the learning rates of the "
            f"{done} iterations so far stay as they were"
        )
    if config.parallel != stored.parallel:
        yield f"Several processes share the run by {config.parallel} from now on: bits may differ"
    now, then = current_stage(), run.read_environment()
    for name, a, b in (
        ("code", representative(now.code_sha256), representative(then.code_sha256)),
        ("number of processes", now.world_size, then.world_size),
        ("number of threads", now.threads, then.threads),
        ("CPU", now.cpu, then.cpu),
    ):
        if a != b:
            yield f"The {name} is not that of the run's start: bits may differ"
    recipe = find_recipe(config.dtype, config.recipe)
    if recipe is not None and recipe.delayed and config.backend != "emulated":
        yield (
            f"Delayed scales start again: {config.backend} keeps their history to itself, so the first "
            "steps are not those of an unbroken run"
        )
    if now.packages != then.packages:
        yield "The installed packages are not those of the start: bits may differ"
    if then.cuda is not UNSET and now.cuda != then.cuda:
        yield "CUDA, its libraries or the GPU are not those of the start: bits may differ"
    yield f"Resuming {run.folder} at iteration {done}"


def _require_device(run: RunFolder, stored: TrainConfig) -> None:
    try:
        choose_device(stored.device)
    except UserError as error:
        raise UserError(
            f"{run.folder} was trained on device '{stored.device}', which this machine lacks: a run goes "
            "on on its own kind of device only, as another computes other bits. Resume it on such a "
            "device; `storylab eval` and `storylab sample` work here too"
        ) from error


def _check_config(stored: TrainConfig, wanted: TrainConfig) -> None:
    changed = differences(stored, wanted)
    changed.pop("max_iters", None)
    if changed:
        shown = "; ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        why = "; a run goes on on its own kind of device only" if "device" in changed else ""
        raise UserError(
            f"cannot resume with another config ({shown}{why}): start a new run instead"
        )


def _check_shares(stored: TrainConfig, wanted: TrainConfig) -> None:
    if stored.max_iters == wanted.max_iters:
        return
    recipe = find_recipe(stored.dtype, stored.recipe)
    moved = {
        "the iteration at which the recipe's forward products go to bfloat16 (low_forward_share)": (
            recipe is not None and recipe.low_forward_share < 1
        ),
    }
    for name, value in flat(stored).items():
        if moving := FIELDS[name].by_length:
            moved[f"{moving} ({name})"] = value != FIELDS[name].before
    for what, moves in moved.items():
        if moves:
            raise UserError(
                f"max_iters {stored.max_iters} -> {wanted.max_iters} moves {what}: start a new run "
                "instead"
            )


def _check_learning_rates(stored: TrainConfig, wanted: TrainConfig, done: int) -> None:
    if done > wanted.iterations:
        raise UserError(f"the run has done {done} iterations, more than max_iters allows")
    for iteration in telling_iterations((stored, wanted), min(done, stored.iterations)):
        was, would_be = learning_rate(stored, iteration), learning_rate(wanted, iteration)
        if was != would_be:
            raise UserError(
                f"max_iters {stored.max_iters} -> {wanted.max_iters} changes the {stored.schedule} "
                f"schedule of iterations already trained (iteration {iteration}: {was:.9g} -> "
                f"{would_be:.9g}): start a new run, or use --schedule constant for runs to extend"
            )
