"""Predictions for runs and arms on GPUs, as the values that a plan prints. This module does not load
torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storylab.config import TrainConfig
from storylab.documents.plan import (
    ArmCost,
    ArmPrediction,
    Gain,
    GpuPrediction,
    MeasuredPlan,
    PartCost,
    RunPrediction,
    RunShape,
    SoftwarePrediction,
)
from storylab.model.cost import training_flops
from storylab.planning.gpus import GPUS, Gpu
from storylab.planning.roofline import (
    gains,
    memory_bytes,
    micro_batch_seconds,
    micro_batch_work,
    tokens_per_second,
    waiting_seconds,
)
from storylab.planning.software import LIMIT, SOFTWARE, Software, SoftwareName
from storylab.precision.backends import has_backend
from storylab.precision.edit import find_recipe
from storylab.precision.recipes import Recipe, quantized_flops_fraction
from storylab.training.log_format import idle_windows

if TYPE_CHECKING:
    from storylab.experiments.experiment import Experiment
    from storylab.training.measure import Measured

# Name of the theoretical limit next to the kinds of software.
LIMIT_NAME = "limit"
# Recipes whose gain a plan shows.
GAINS = ("fp8", "nvfp4")


def find_software(name: str) -> Software:
    """The kind of software that :data:`SOFTWARE` lists as ``name``, or the limit of the card."""
    return LIMIT if name == LIMIT_NAME else SOFTWARE[name]


def run_shape(config: TrainConfig, vocab_size: int) -> RunShape:
    """Size and FLOPs of a run."""
    flops = training_flops(config.model, vocab_size, config.block_size)
    return RunShape(
        preset=config.preset,
        dtype=config.dtype,
        parameters=config.model.parameter_count(vocab_size),
        tokens=config.total_tokens,
        flops_per_token=flops,
        flops=flops * config.total_tokens,
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


def predict_run(name: str, config: TrainConfig, vocab_size: int) -> GpuPrediction:
    """A run on the GPU that :data:`GPUS` lists as ``name``."""
    gpu = GPUS[name]
    reason = obstacle(gpu, config)
    run = None if reason else _run_prediction(gpu, config, vocab_size)
    return _gpu_prediction(name, gpu, reason, run, None)


def predict_arms(
    name: str, experiment: Experiment, vocab_size: int, software: SoftwareName
) -> GpuPrediction:
    """Every arm of an experiment on the GPU that :data:`GPUS` lists as ``name``."""
    gpu = GPUS[name]
    arms = [
        _arm_prediction(cell.arm, cell.condition, cell.config, vocab_size, gpu, software)
        for cell in experiment.cells
    ]
    return _gpu_prediction(name, gpu, None, None, arms)


def _gpu_prediction(
    name: str,
    gpu: Gpu,
    reason: str | None,
    run: RunPrediction | None,
    arms: list[ArmPrediction] | None,
) -> GpuPrediction:
    return GpuPrediction(
        gpu=name,
        name=gpu.name,
        peak_flops_per_second={unit: rate * 1e12 for unit, rate in gpu.tflops.items()},
        bandwidth_bytes_per_second=gpu.bandwidth * 1e12,
        memory_bytes=gpu.memory * 1e9,
        power_watts=gpu.watts,
        obstacle=reason,
        run=run,
        arms=arms,
    )


def _run_prediction(gpu: Gpu, config: TrainConfig, vocab_size: int) -> RunPrediction:
    """A run with every kind of software, and at the limit of the card."""
    memory = memory_bytes(config, vocab_size)
    return RunPrediction(
        software=[
            _with_software(gpu, config, vocab_size, name) for name in (*SOFTWARE, LIMIT_NAME)
        ],
        training_memory_bytes=memory,
        fits=memory < gpu.memory * 1e9,
        idle_windows=idle_windows(config.model, config.block_size),
    )


def _with_software(gpu: Gpu, config: TrainConfig, vocab_size: int, name: str) -> SoftwarePrediction:
    software = find_software(name)
    recipe = find_recipe(config.dtype, config.recipe)
    table = micro_batch_work(config, vocab_size, software, recipe)
    seconds = micro_batch_seconds(table, gpu, software)
    tokens = config.batch_size * config.block_size
    flops = training_flops(config.model, vocab_size, config.block_size) * tokens
    whole = _run_seconds(config, seconds)
    slowest, fastest = _speeds_of_cards(gpu, config, vocab_size, software, recipe)
    return SoftwarePrediction(
        software=name,
        parts=[
            PartCost(
                name=work.name,
                part=work.part,
                flops=work.flops,
                bytes=work.bytes,
                seconds=work.seconds(gpu, software),
            )
            for work in table
        ],
        waiting_seconds=waiting_seconds(table, gpu, software),
        micro_batch_seconds=seconds,
        tokens_per_second=tokens / seconds,
        slowest_tokens_per_second=slowest,
        fastest_tokens_per_second=fastest,
        bfloat16_peak_share=flops / seconds / (gpu.tflops["bfloat16"] * 1e12),
        training_seconds=whole,
        energy_joules=whole * gpu.watts,
        gains=[
            _gain(gpu, config, vocab_size, software, gain, wanted)
            for gain in GAINS
            if config.dtype == "bfloat16"
            and (wanted := find_recipe(gain)) is not None
            and can_run(gpu, wanted)
        ],
    )


def _speeds_of_cards(
    gpu: Gpu, config: TrainConfig, vocab_size: int, software: Software, recipe: Recipe | None
) -> tuple[float | None, float | None]:
    """Tokens per second on the slowest and the fastest measured card of this name; None where cards do
    not differ, and for the limit."""
    cards = None if software.limit else gpu.measured_cards()
    if cards is None:
        return None, None
    slow, fast = (tokens_per_second(config, vocab_size, card, software, recipe) for card in cards)
    return slow, fast


def _gain(
    gpu: Gpu, config: TrainConfig, vocab_size: int, software: Software, name: str, recipe: Recipe
) -> Gain:
    speedup, largest = gains(config, vocab_size, gpu, software, recipe)
    return Gain(
        recipe=name,
        quantized_flops_share=quantized_flops_fraction(
            recipe, config.model, vocab_size, config.block_size
        ),
        speedup=speedup,
        largest_speedup=largest,
    )


def _arm_prediction(
    arm: str, condition: str, config: TrainConfig, vocab_size: int, gpu: Gpu, software: str
) -> ArmPrediction:
    """One seed of an arm; an empty condition means none."""
    reason = obstacle(gpu, config)
    return ArmPrediction(
        arm=arm,
        condition=condition or None,
        software=software,
        obstacle=reason,
        cost=None if reason else _arm_cost(config, vocab_size, gpu, find_software(software)),
    )


def _arm_cost(config: TrainConfig, vocab_size: int, gpu: Gpu, software: Software) -> ArmCost:
    recipe = find_recipe(config.dtype, config.recipe)
    work = micro_batch_work(config, vocab_size, software, recipe)
    micro_batch = micro_batch_seconds(work, gpu, software)
    return ArmCost(
        tokens_per_second=config.batch_size * config.block_size / micro_batch,
        training_seconds=_run_seconds(config, micro_batch),
        training_memory_bytes=memory_bytes(config, vocab_size),
    )


def predict_here(measured: Measured, config: TrainConfig) -> MeasuredPlan:
    """A run on this machine, from steps that were just measured."""
    seconds = measured.seconds(config)
    return MeasuredPlan(
        micro_batch_seconds=measured.micro_batch,
        update_seconds=measured.update or None,
        tokens_per_second=config.total_tokens / seconds,
        training_seconds=seconds,
        peak_memory_bytes=measured.memory,
    )


def _run_seconds(config: TrainConfig, micro_batch: float) -> float:
    return config.iterations * config.gradient_accumulation_steps * micro_batch
