"""The verbs about the cost of training: plan predicts, bench measures."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from storylab.config import PRESETS, Dtype, TrainConfig
from storylab.errors import UserError
from storylab.flags import default_for, given_flags, parse, vocab_size_or
from storylab.planning.gpus import GPUS, GpuName
from storylab.planning.software import SOFTWARE, SoftwareName

# Seconds for which --gpu this trains, and the least number of steps of each kind.
CALIBRATION_SECONDS, CALIBRATION_STEPS = 20.0, 3


@dataclass(frozen=True)
class PlanCommand:
    """Predict the cost of a run or an experiment on a GPU, part by part: speed, time, energy, memory, and
    the most that FP8 and NVFP4 can bring there. Nothing is run, except with --gpu this.

    Examples: storylab plan --gpu rtx5090 | storylab plan --preset nano --gpu this
    | storylab plan experiments/02-fp8.toml --scale record --gpu rtx4090 --software compiled
    """

    file: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")] = None
    """Experiment file; without one, the run that the flags describe."""
    gpu: tuple[GpuName, ...] = ("rtx5090",)
    """GPUs, or this: the machine at hand, timed for some 20 seconds (at least 4 to 12 micro-batches)."""
    scale: str | None = None
    """One of the experiment's scales."""
    software: SoftwareName = "eager"
    """For an experiment: how well its products and kernels use the GPU."""
    vocab_size: int = 0
    """Token ids; 0: as many as the preset is counted with, or the experiment's tokenizer has."""
    config: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class BenchCommand:
    """Time training steps on this machine in every precision and attention pattern: tok/s, share of the
    GPU's peak, memory, energy, and the share of each part of a step. Nothing is kept.

    On a CPU a micro-batch is 8 sequences unless --batch_size says otherwise, and a low-precision dtype
    takes the time of its emulation.

    Examples: storylab bench --preset 10m | storylab bench --dtypes bfloat16 float32 --compile
    """

    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32", "fp8", "mxfp8", "nvfp4")
    """What to time."""
    attentions: tuple[str, ...] = ("window:64",)
    """Attention patterns to time in bfloat16, besides the model's own."""
    seconds: float = 40.0
    """Seconds of steps, shared by all; starting, warming up and profiling take more."""
    vocab_size: int = 0
    """Token ids; 0: as many as the preset is counted with."""
    config: TrainConfig = field(default_factory=TrainConfig)


def plan(args: list[str]) -> int:
    """``storylab plan``."""
    command = parse(PlanCommand, args, "storylab plan", PlanCommand(config=default_for(args)))
    of_plan = {f.name for f in dataclasses.fields(PlanCommand)}
    given = given_flags(args)
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


def bench(args: list[str]) -> int:
    """``storylab bench``."""
    command = parse(BenchCommand, args, "storylab bench", BenchCommand(config=default_for(args)))
    from storylab.planning.bench import CPU_SEQUENCES, bench_lines, variants
    from storylab.training.loop import TrainingInterrupted
    from storylab.training.precision import choose_device

    config = command.config
    if not 0 < command.seconds < float("inf"):
        raise UserError(f"seconds is {command.seconds}: it must be a finite number above 0")
    if not command.dtypes:
        raise UserError("give at least one of --dtypes")
    given = given_flags(args)
    if "dtype" in given:
        raise UserError("a bench has --dtypes, one or more, instead of --dtype")
    device = choose_device(config.device)
    if device.type == "cpu" and "batch_size" not in given:
        config = dataclasses.replace(config, batch_size=CPU_SEQUENCES)
    config = dataclasses.replace(config, compile=bool(config.compile))
    vocab_size = vocab_size_or(command.vocab_size, PRESETS[config.preset].vocab_size)
    print(
        f"{config.preset} on {device}: steps of one micro-batch, {config.batch_size} x "
        f"{config.block_size} tokens, {vocab_size:,} ids, the update included"
    )
    configs = list(variants(config, command.dtypes, command.attentions))
    try:
        for line in bench_lines(configs, vocab_size, command.seconds):
            print(line, flush=True)
    except TrainingInterrupted as stop:  # raised where a worker was at it
        print("storylab: interrupted", file=sys.stderr)
        return 128 + stop.signal_number
    return 0
