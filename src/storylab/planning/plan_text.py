"""The text of a plan: the predicted cost of a run, part by part. This module does not load torch."""

from __future__ import annotations

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


def head_line(config: TrainConfig, vocab_size: int) -> str:
    """The first line: model, precision, tokens and FLOPs of the run."""
    tokens = config.total_tokens
    flops = training_flops(config.model, vocab_size, config.block_size)
    return (
        f"{config.preset}, {config.model.parameter_count(vocab_size):,} parameters, {config.dtype}: "
        f"{tokens:,} tokens of {flops / 1e6:,.0f} MFLOP, {flops * tokens:.2g} FLOP in all"
    )


def can_run(gpu: Gpu, recipe: Recipe | None) -> bool:
    """Whether a GPU can train by a recipe, and a backend has it."""
    if recipe is None:
        return True
    return not recipe.missing_features(gpu.capability) and has_backend(recipe)


def obstacle(gpu: Gpu, config: TrainConfig) -> str | None:
    """Why there is no plan for a run on a GPU, or None."""
    recipe = find_recipe(config.dtype, config.recipe)
    if config.dtype == "float32":
        return "float32 is not planned for: its products run on other units"
    if config.backend == "emulated":
        return "emulated: its time is no measure of hardware"
    if recipe is not None and not has_backend(recipe):
        return "no library computes this recipe: it can be emulated"
    return None if can_run(gpu, recipe) else f"{gpu.name} cannot train in {config.dtype}"


def gpu_lines(gpu: Gpu, config: TrainConfig, vocab_size: int) -> Iterator[str]:
    """The plan of a run on a GPU; everything in it is predicted."""
    names = {"fp8": "FP8", "fp4": "FP4"}
    rates = [f"{rate:g} {names.get(unit, unit)}" for unit, rate in gpu.tflops.items()]
    yield (
        f"{gpu.name}: {', '.join(rates)} TFLOP/s, {gpu.bandwidth:g} TB/s, {gpu.memory:g} GB, "
        f"{gpu.watts:g} W; everything below is predicted"
    )
    if reason := obstacle(gpu, config):
        yield f"  {reason}"
        return
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
        yield (
            "  converted: the linear layers of the blocks; head, attention and memory-bound work stay as "
            "before"
        )
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
    )


def arm_line(name: str, config: TrainConfig, vocab_size: int, gpu: Gpu, software: Software) -> str:
    """The line of one arm of an experiment on a GPU, with one kind of software."""
    recipe = find_recipe(config.dtype, config.recipe)
    if reason := obstacle(gpu, config):
        return f"  {name:<44} {reason}"
    work = micro_batch_work(config, vocab_size, software, recipe)
    seconds = micro_batch_seconds(work, gpu, software)
    tokens = config.batch_size * config.block_size
    memory = memory_bytes(config, vocab_size) / 1e9
    return (
        f"  {name:<44} {tokens / seconds:>11,.0f} tok/s {_run_time(config, seconds):>14} a seed "
        f"{memory:>6.1f} GB"
    )
