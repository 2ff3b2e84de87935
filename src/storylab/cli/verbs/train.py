"""``storylab train``, and ``train_tinystories.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from storylab.cli.arguments import Track
from storylab.cli.registry import Call, Verb
from storylab.config import DEFAULT_DATA_DIR, TrainConfig
from storylab.errors import UserError
from storylab.files import exists
from storylab.flags import default_for, given_flags
from storylab.tracking import require_installed

if TYPE_CHECKING:
    from storylab.training.ranks import Ranks


@dataclass(frozen=True)
class TrainCommand:
    """Train a model. The defaults are those of the original log: 113M parameters, 131,072 tokens an
    iteration.

    Without --data_dir, the TinyStories data set is downloaded and prepared first. On a GPU, without
    --batch_size and --gradient_accumulation_steps, micro-batches are as long as its free memory allows; an
    iteration has the same tokens.

    Examples: storylab train --dtype bfloat16 --max_iters 1000
    | storylab train --preset 10m --data_dir data/files-gpt2 --out_dir runs/a
    | storylab train (the same flags) --out_dir runs/a --resume
    | torchrun --nproc_per_node 2 -m storylab train (the same flags)
    | storylab train --preset nano --track tensorboard mlflow
    """

    config: TrainConfig = field(default_factory=TrainConfig)
    resume: bool = False
    """Continue the run in --out_dir; its config must be the same."""
    track: Track = ()


def run(call: Call) -> int:
    """Train a run, or continue it with --resume."""
    command = call.parse(TrainCommand, TrainCommand(default_for(call.args)))
    require_installed(command.track)
    config = command.config
    split_is_free = not {"batch_size", "gradient_accumulation_steps"} & {*given_flags(call.args)}
    if command.resume and config.out_dir is None:
        raise UserError("--resume needs --out_dir RUN: the run folder to continue")
    from storylab.training.parallel import joined

    with joined(config.device) as ranks:
        if command.resume or _interrupted(config):
            return _resume(config, command.track, split_is_free, ranks)
        return _train(config, command.track, split_is_free, ranks)


def _interrupted(config: TrainConfig) -> bool:
    """Whether torchrun has started the command again, and its run has begun."""
    from storylab.record.folder import CONFIG
    from storylab.training.parallel import may_restart, restarted

    if may_restart() and config.out_dir is None:
        raise UserError("torchrun --max-restarts needs --out_dir, to find the run again")
    return restarted() and config.out_dir is not None and exists(config.out_dir / CONFIG)


def _resume(config: TrainConfig, track: Sequence[str], split_is_free: bool, ranks: Ranks) -> int:
    from storylab.cli.training import show_training
    from storylab.planning.micro_batch import split_as
    from storylab.record.folder import open_run
    from storylab.training.resume import resume

    folder = config.out_dir
    assert folder is not None
    if split_is_free:
        config = split_as(open_run(folder).read_config(), config)
    return show_training(partial(resume, folder, config, ranks=ranks), track, prints=ranks.leads)


def _train(config: TrainConfig, track: Sequence[str], split_is_free: bool, ranks: Ranks) -> int:
    from storylab.cli.training import show_training
    from storylab.planning.micro_batch import fitted_here
    from storylab.training.precision import choose_device
    from storylab.training.train import train

    if config.data_dir == DEFAULT_DATA_DIR and not DEFAULT_DATA_DIR.exists():
        if ranks.size > 1:
            raise UserError("there is no data set yet: make it first, by `storylab prepare`")
        _prepare_default_data(config)
    if split_is_free:
        chosen = fitted_here(config, choose_device(config.device), ranks)
        if chosen != config and ranks.leads:
            print(
                f"micro-batches of {chosen.batch_size} sequences, which fit into the GPU's memory"
            )
        config = chosen
    return show_training(partial(train, config, ranks=ranks), track, prints=ranks.leads)


def _prepare_default_data(config: TrainConfig) -> None:
    from storylab.cli.datasets import prepare_and_describe
    from storylab.data.prepare_config import PrepareConfig
    from storylab.training.setup import resolve

    resolve(config)  # so that a config that cannot run fails before a gigabyte is fetched for it
    prepare_and_describe(PrepareConfig())


VERB = Verb("train", "train a model; the defaults are those of the original experiment", "runs", run,
            command=TrainCommand, position=2)  # fmt: skip
