"""``storylab plan``."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from storylab.cli.arguments import AsJson
from storylab.cli.documents import print_document
from storylab.cli.registry import Call, Verb
from storylab.config import PRESETS, TrainConfig
from storylab.documents.plan import (
    ExperimentShape,
    GpuPrediction,
    MeasuredPlan,
    PlanDocument,
)
from storylab.errors import UserError
from storylab.flags import default_for, given_flags, vocab_size_or
from storylab.planning.gpus import GpuName
from storylab.planning.software import SOFTWARE, UNSEEN_RUNS, SoftwareName

if TYPE_CHECKING:
    from storylab.experiments.experiment import Experiment

# Seconds that --gpu this trains for, and the least number of steps of each kind.
CALIBRATION_SECONDS, CALIBRATION_STEPS = 20.0, 3


@dataclass(frozen=True)
class PlanCommand:
    """Predict the cost of a run or an experiment on a GPU, part by part: speed, time, energy, memory, and
    the most that FP8 and NVFP4 can bring there. Nothing is run, except with --gpu this.

    Examples: storylab plan --gpu rtx5090 | storylab plan --preset nano --gpu this
    | storylab plan experiments/02-fp8.toml --scale record --gpu rtx4090 --software compiled
    """

    file: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")] = None
    """Experiment file; without one, plan the run that the flags describe."""
    gpu: tuple[GpuName, ...] = ("rtx5090",)
    """GPUs, or this: times this machine for some 20 seconds (at least 4 to 12 micro-batches)."""
    scale: str | None = None
    """One of the experiment's scales."""
    software: SoftwareName = "eager"
    """For an experiment: the kind of software, which decides how well it uses the GPU."""
    vocab_size: int = 0
    """Vocabulary size; 0: the preset's, or that of the experiment's tokenizer."""
    json: AsJson = False
    config: TrainConfig = field(default_factory=TrainConfig)


def run(call: Call) -> int:
    """Print the plan of a run, or of an experiment."""
    command = call.parse(PlanCommand, PlanCommand(config=default_for(call.args)))
    _refuse_odd_flags(command, given_flags(call.args))
    if command.json:
        print_document(lambda: _document(command))
    elif command.file is None:
        _print_run(command)
    else:
        _print_experiment(command, command.file)
    return 0


def _refuse_odd_flags(command: PlanCommand, given: list[str]) -> None:
    of_plan = {f.name for f in dataclasses.fields(PlanCommand)}
    if command.file is None:
        if odd := [name for name in given if name in ("scale", "software")]:
            raise UserError(f"{_spelled(odd)}: for an experiment; give its FILE, or leave it out")
    elif odd := [name for name in given if name not in of_plan]:
        raise UserError(
            f"{_spelled(odd)}: {command.file} says how its runs are trained; change it there"
        )


def _spelled(names: list[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _vocab_size(command: PlanCommand) -> int:
    return vocab_size_or(command.vocab_size, PRESETS[command.config.preset].vocab_size)


def _run_plans(command: PlanCommand) -> Iterator[GpuPrediction | MeasuredPlan]:
    """The plan of the run on each GPU, in the order of the flags."""
    from storylab.planning.predict import predict_here, predict_run

    config, vocab_size = command.config, _vocab_size(command)
    for gpu in command.gpu:
        if gpu == "this":
            from storylab.training.measure import StepTimer

            timer = StepTimer(config, vocab_size)
            yield predict_here(timer.measured(CALIBRATION_SECONDS, CALIBRATION_STEPS), config)
        else:
            yield predict_run(gpu, config, vocab_size)


def _print_run(command: PlanCommand) -> None:
    from storylab.planning.plan_text import gpu_lines, head_line, measured_line
    from storylab.planning.predict import run_shape

    shape = run_shape(command.config, _vocab_size(command))
    print(head_line(shape))
    for plan in _run_plans(command):
        lines = (measured_line(plan),) if isinstance(plan, MeasuredPlan) else gpu_lines(plan, shape)
        print("", *lines, sep="\n")


def _arm_plans(
    command: PlanCommand, file: Path, experiment: Experiment, vocab_size: int
) -> Iterator[GpuPrediction]:
    """The plan of every arm on each GPU, in the order of the flags."""
    from storylab.planning.predict import predict_arms

    for gpu in command.gpu:
        if gpu == "this":
            raise UserError(
                f"for this machine: storylab experiment run {shlex.quote(str(file))} --dry_run"
            )
        yield predict_arms(gpu, experiment, vocab_size, command.software)


def _print_experiment(command: PlanCommand, file: Path) -> None:
    from storylab.cli.tables import print_lines
    from storylab.experiments.spec import load_experiment
    from storylab.planning.plan_text import arm_line

    experiment = load_experiment(file, command.scale)
    vocab_size = vocab_size_or(command.vocab_size, experiment.vocab_size)
    print_lines(f"{experiment.title}: {len(experiment.seeds)} seeds of every arm")
    for plan in _arm_plans(command, file, experiment, vocab_size):
        print(f"\n{plan.name}, {SOFTWARE[command.software].name}, predicted:")
        for arm in plan.arms or ():
            print_lines(arm_line(arm))


def _document(command: PlanCommand) -> PlanDocument:
    from storylab.experiments.spec import load_experiment
    from storylab.planning.predict import run_shape

    if command.file is None:
        vocab_size = _vocab_size(command)
        plans = list(_run_plans(command))
        return PlanDocument(
            vocab_size=vocab_size,
            run=run_shape(command.config, vocab_size),
            experiment=None,
            gpus=[plan for plan in plans if isinstance(plan, GpuPrediction)],
            measured_over_predicted=list(UNSEEN_RUNS),
            this_machine=next((plan for plan in plans if isinstance(plan, MeasuredPlan)), None),
        )
    experiment = load_experiment(command.file, command.scale)
    vocab_size = vocab_size_or(command.vocab_size, experiment.vocab_size)
    return PlanDocument(
        vocab_size=vocab_size,
        run=None,
        experiment=ExperimentShape(
            file=str(command.file),
            title=experiment.title,
            scale=experiment.scale or None,
            seeds=len(experiment.seeds),
        ),
        gpus=list(_arm_plans(command, command.file, experiment, vocab_size)),
        measured_over_predicted=list(UNSEEN_RUNS),
        this_machine=None,
    )


VERB = Verb(
    "plan",
    "predict time and memory of a run or an experiment, and the gain from FP8 or NVFP4",
    "experiments",
    run,
    PlanCommand,
    position=4,
)
