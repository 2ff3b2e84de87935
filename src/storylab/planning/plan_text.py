"""The text of a plan, from its values. This module does not load torch."""

from __future__ import annotations

<<<<<<< HEAD
from collections.abc import Iterator
from typing import TYPE_CHECKING

from storylab.config import TrainConfig
from storylab.model.cost import training_flops
from storylab.planning.gpus import Gpu
from storylab.planning.roofline import gains, memory_bytes, micro_batch_seconds, micro_batch_work
from storylab.planning.software import LIMIT, SOFTWARE, Software
from storylab.precision.backends import has_backend
from storylab.precision.edit import find_recipe
from storylab.precision.recipes import Recipe, quantized_flops_fraction
from storylab.training.log_format import format_duration, idle_windows

if TYPE_CHECKING:
    from storylab.training.measure import Measured

# Recipes whose gain a plan shows, by the name in the table.
GAINS = {"FP8": "fp8", "NVFP4": "nvfp4"}
# Columns of a plan.
KINDS = (*SOFTWARE.values(), LIMIT)

Row = tuple[str, list[str]]
=======
from collections.abc import Iterator, Sequence

from storylab.documents.plan import (
    ArmPrediction,
    GpuPrediction,
    MeasuredPlan,
    RunShape,
    SoftwarePrediction,
)
from storylab.experiments.factors import under
from storylab.planning.predict import find_software
from storylab.training.lines import duration

# Names of matrix units and recipes in the text.
NAMES = {"fp8": "FP8", "fp4": "FP4", "nvfp4": "NVFP4"}
>>>>>>> s16-json


def head_line(shape: RunShape) -> str:
    """The first line: model, precision, tokens and FLOPs of the run."""
    return (
        f"{shape.preset}, {shape.parameters:,} parameters, {shape.dtype}: {shape.tokens:,} tokens of "
        f"{shape.flops_per_token / 1e6:,.0f} MFLOP, {shape.flops:.2g} FLOP in all"
    )


def gpu_lines(gpu: GpuPrediction, shape: RunShape) -> Iterator[str]:
    """The plan of a run on a GPU; everything in it is predicted."""
<<<<<<< HEAD
    names = {"fp8": "FP8", "fp4": "FP4"}
    rates = [f"{rate:g} {names.get(unit, unit)}" for unit, rate in gpu.tflops.items()]
=======
    rates = [
        f"{rate / 1e12:g} {NAMES.get(unit, unit)}"
        for unit, rate in gpu.peak_flops_per_second.items()
    ]
>>>>>>> s16-json
    yield (
        f"{gpu.name}: {', '.join(rates)} TFLOP/s, {gpu.bandwidth_bytes_per_second / 1e12:g} TB/s, "
        f"{gpu.memory_bytes / 1e9:g} GB, {gpu.power_watts:g} W; everything below is predicted"
    )
    run = gpu.run
    if run is None:
        yield f"  {gpu.obstacle}"
        return
<<<<<<< HEAD
    table = (_work_rows, _run_rows, _gain_rows)
    for name, cells in (row for rows in table for row in rows(gpu, config, vocab_size)):
        yield f"  {name:<62}" + "".join(f"{cell:>22}" for cell in cells)
    yield from _notes(gpu, config, vocab_size)


def _work_rows(gpu: Gpu, config: TrainConfig, vocab_size: int) -> Iterator[Row]:
    """The milliseconds of every part of a micro-batch, under a row with the kinds of software."""
    recipe = find_recipe(config.dtype, config.recipe)
    yield "ms for a micro-batch (GFLOP, GB eager)", [kind.name for kind in KINDS]
    tables = [micro_batch_work(config, vocab_size, kind, recipe) for kind in KINDS]
    for i, work in enumerate(tables[0]):
        times = [table[i].seconds(gpu, kind) for table, kind in zip(tables, KINDS, strict=True)]
        name = f"{work.name} ({work.flops / 1e9:,.0f}, {work.bytes / 1e9:.2f})"
        yield name, [f"{1e3 * t:.2f}" for t in times]
    yield "all", [f"{1e3 * s:.2f}" for s in _seconds(gpu, config, vocab_size)]


def _run_rows(gpu: Gpu, config: TrainConfig, vocab_size: int) -> Iterator[Row]:
    """Speed, time and energy of the run."""
    seconds = _seconds(gpu, config, vocab_size)
    tokens = config.batch_size * config.block_size
    flops = training_flops(config.model, vocab_size, config.block_size) * tokens
    peak = gpu.tflops["bfloat16"] * 1e12
    yield "tok/s", [f"{tokens / s:,.0f}" for s in seconds]
    yield "of the bfloat16 peak", [f"{flops / s / peak:.0%}" for s in seconds]
    yield "the whole run, evaluations left out", [_run_time(config, s) for s in seconds]
    energy = [f"{_run_seconds(config, s) * gpu.watts / 3.6e6:.2f} kWh" for s in seconds]
    yield "energy at the rated power (an upper bound)", energy


def _gain_rows(gpu: Gpu, config: TrainConfig, vocab_size: int) -> Iterator[Row]:
    """The gain that low precision would bring to a bfloat16 run, where the GPU has it."""
    for name, recipe_name in GAINS.items():
        wanted = find_recipe(recipe_name)
        if config.dtype != "bfloat16" or wanted is None or not can_run(gpu, wanted):
            continue
        share = quantized_flops_fraction(wanted, config.model, vocab_size, config.block_size)
        found = [gains(config, vocab_size, gpu, kind, wanted) for kind in KINDS]
        brings = f"{name} brings ({share:.0%} of FLOPs convert)"
        yield brings, [f"{gain:.2f}x" for gain, _ in found]
        yield f"{name} can bring at most (Amdahl)", [f"{most:.2f}x" for _, most in found]


def _notes(gpu: Gpu, config: TrainConfig, vocab_size: int) -> Iterator[str]:
    """Lines under the table: the parts that low precision converts, windows of no use, memory."""
    if config.dtype == "bfloat16":
=======
    for name, cells in _rows(run.software):
        yield f"  {name:<62}" + "".join(f"{cell:>22}" for cell in cells)
    if shape.dtype == "bfloat16":
>>>>>>> s16-json
        yield (
            "  converted: the linear layers of the blocks; head, attention and memory-bound work stay as "
            "before"
        )
<<<<<<< HEAD
    if idle := idle_windows(config.model, config.block_size):
        yield f"  {idle}"
    memory = memory_bytes(config, vocab_size)
    room = "" if memory < gpu.memory * 1e9 else ": more than the card has, take a smaller batch"
    yield f"  memory about {memory / 1e9:.1f} GB{room}"


def _seconds(gpu: Gpu, config: TrainConfig, vocab_size: int) -> list[float]:
    """Predicted seconds of a micro-batch with each kind of software."""
    recipe = find_recipe(config.dtype, config.recipe)
    tables = ((kind, micro_batch_work(config, vocab_size, kind, recipe)) for kind in KINDS)
    return [micro_batch_seconds(work, gpu, kind) for kind, work in tables]


def _run_seconds(config: TrainConfig, micro_batch: float) -> float:
    return config.iterations * config.gradient_accumulation_steps * micro_batch


def _run_time(config: TrainConfig, micro_batch: float) -> str:
    return format_duration(_run_seconds(config, micro_batch))


def measured_lines(measured: Measured, config: TrainConfig) -> Iterator[str]:
    """The plan of a run on this machine, from steps that were just measured."""
    seconds = measured.seconds(config)
    tokens = config.total_tokens
    update = f" and {measured.update:.3f} s for an update" if measured.update else " and its update"
    yield (
        f"this machine, from {measured.micro_batch:.3f} s measured for a micro-batch{update}: "
        f"{tokens / seconds:,.0f} tok/s, {format_duration(seconds)} for the whole run, evaluations left "
        f"out (predicted); {measured.memory / 1e9:.2f} GB (measured)"
=======
    if run.idle_windows:
        yield f"  {run.idle_windows}"
    room = "" if run.fits else ": more than the card has, take a smaller batch"
    yield f"  memory about {run.training_memory_bytes / 1e9:.1f} GB{room}"


def _rows(kinds: Sequence[SoftwarePrediction]) -> Iterator[tuple[str, list[str]]]:
    """Rows of the table, each with a cell for every kind of software."""
    yield (
        "ms for a micro-batch (GFLOP, GB eager)",
        [find_software(kind.software).name for kind in kinds],
>>>>>>> s16-json
    )
    for i, part in enumerate(kinds[0].parts):
        name = f"{part.name} ({part.flops / 1e9:,.0f}, {part.bytes / 1e9:.2f})"
        yield name, [f"{1e3 * kind.parts[i].seconds:.2f}" for kind in kinds]
    yield "all", [f"{1e3 * kind.micro_batch_seconds:.2f}" for kind in kinds]
    yield "tok/s", [f"{kind.tokens_per_second:,.0f}" for kind in kinds]
    yield "of the bfloat16 peak", [f"{kind.bfloat16_peak_share:.0%}" for kind in kinds]
    yield (
        "the whole run, evaluations left out",
        [duration(kind.training_seconds) for kind in kinds],
    )
    yield (
        "energy at the rated power (an upper bound)",
        [f"{kind.energy_joules / 3.6e6:.2f} kWh" for kind in kinds],
    )
    for i, gain in enumerate(kinds[0].gains):
        name, share = NAMES[gain.recipe], gain.quantized_flops_share
        found = [kind.gains[i] for kind in kinds]
        yield (
            f"{name} brings ({share:.0%} of FLOPs convert)",
            [f"{each.speedup:.2f}x" for each in found],
        )
        yield (
            f"{name} can bring at most (Amdahl)",
            [f"{each.largest_speedup:.2f}x" for each in found],
        )


def measured_line(plan: MeasuredPlan) -> str:
    """The plan of a run on this machine."""
    update = plan.update_seconds
    more = " and its update" if update is None else f" and {update:.3f} s for an update"
    return (
        f"this machine, from {plan.micro_batch_seconds:.3f} s measured for a micro-batch{more}: "
        f"{plan.tokens_per_second:,.0f} tok/s, {duration(plan.training_seconds)} for the whole run, "
        f"evaluations left out (predicted); {plan.peak_memory_bytes / 1e9:.2f} GB (measured)"
    )


def arm_line(arm: ArmPrediction) -> str:
    """The line of one arm of an experiment on a GPU, with one kind of software."""
    name = under(arm.arm, arm.condition or "")
    cost = arm.cost
    if cost is None:
        return f"  {name:<44} {arm.obstacle}"
    return (
        f"  {name:<44} {cost.tokens_per_second:>11,.0f} tok/s "
        f"{duration(cost.training_seconds):>14} a seed {cost.training_memory_bytes / 1e9:>6.1f} GB"
    )
