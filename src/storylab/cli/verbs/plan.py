"""``storylab plan``."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from storylab.cli.registry import Call, Verb
from storylab.config import PRESETS, TrainConfig
from storylab.errors import UserError
from storylab.flags import default_for, given_flags, vocab_size_or
from storylab.planning.gpus import GPUS, GpuName
from storylab.planning.software import SOFTWARE, SoftwareName

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
    config: TrainConfig = field(default_factory=TrainConfig)


def run(call: Call) -> int:
    """Print the plan of a run, or of an experiment."""
    command = call.parse(PlanCommand, PlanCommand(config=default_for(call.args)))
    of_plan = {f.name for f in dataclasses.fields(PlanCommand)}
    given = given_flags(call.args)
    if command.file is None:
        if odd := [name for name in given if name in ("scale", "software")]:
            raise UserError(f"{_spelled(odd)}: for an experiment; give its FILE, or leave it out")
        _plan_run(command)
    else:
        if odd := [name for name in given if name not in of_plan]:
            raise UserError(
                f"{_spelled(odd)}: {command.file} says how its runs are trained; change it there"
            )
        _plan_experiment(command, command.file)
    return 0


def _spelled(names: list[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _plan_run(command: PlanCommand) -> None:
    from storylab.planning.plan_text import gpu_lines, head_line, measured_lines

    config = command.config
    vocab_size = vocab_size_or(command.vocab_size, PRESETS[config.preset].vocab_size)
    print(head_line(config, vocab_size))
    for gpu in command.gpu:
        if gpu == "this":
            from storylab.training.measure import StepTimer

            timer = StepTimer(config, vocab_size)
            lines = measured_lines(timer.measured(CALIBRATION_SECONDS, CALIBRATION_STEPS), config)
        else:
            lines = gpu_lines(GPUS[gpu], config, vocab_size)
        print("", *lines, sep="\n")


def _plan_experiment(command: PlanCommand, file: Path) -> None:
    from storylab.experiments.factors import under
    from storylab.experiments.spec import load_experiment
    from storylab.planning.plan_text import arm_line

    experiment = load_experiment(file, command.scale)
    vocab_size = vocab_size_or(command.vocab_size, experiment.vocab_size)
    print(f"{experiment.title}: {len(experiment.seeds)} seeds of every arm")
    for gpu in command.gpu:
        if gpu == "this":
            raise UserError(
                f"for this machine: storylab experiment run {shlex.quote(str(file))} --dry_run"
            )
        software = SOFTWARE[command.software]
        print(f"\n{GPUS[gpu].name}, {software.name}, predicted:")
        for cell in experiment.cells:
            name = under(cell.arm, cell.condition)
            print(arm_line(name, cell.config, vocab_size, GPUS[gpu], software))


VERB = Verb(
    "plan",
    "predict time and memory of a run or an experiment, and the gain from FP8 or NVFP4",
    "experiments",
    run,
    position=4,
)
