"""The text of a plan, from its values. This module does not load torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from storylab.documents.plan import (
    ArmPrediction,
    GpuPrediction,
    MeasuredPlan,
    RunShape,
    SoftwarePrediction,
)
from storylab.experiments.factors import qualified_name
from storylab.planning.predict import find_software
from storylab.planning.software import UNSEEN_RUNS
from storylab.training.log_format import format_duration

# Names of matrix units and recipes in the text.
NAMES = {"fp8": "FP8", "fp4": "FP4", "nvfp4": "NVFP4"}


def head_line(shape: RunShape) -> str:
    """The first line: model, precision, tokens and FLOPs of the run."""
    return (
        f"{shape.preset}, {shape.parameters:,} parameters, {shape.dtype}: {shape.tokens:,} tokens of "
        f"{shape.flops_per_token / 1e6:,.0f} MFLOP, {shape.flops:.2g} FLOP in all"
    )


def gpu_lines(gpu: GpuPrediction, shape: RunShape) -> Iterator[str]:
    """The plan of a run on a GPU; everything in it is predicted."""
    rates = [
        f"{rate / 1e12:g} {NAMES.get(unit, unit)}"
        for unit, rate in gpu.peak_flops_per_second.items()
    ]
    yield (
        f"{gpu.name}: {', '.join(rates)} TFLOP/s, {gpu.bandwidth_bytes_per_second / 1e12:g} TB/s, "
        f"{gpu.memory_bytes / 1e9:g} GB, {gpu.power_watts:g} W; everything below is predicted"
    )
    run = gpu.run
    if run is None:
        yield f"  {gpu.obstacle}"
        return
    for name, cells in _rows(run.software):
        yield f"  {name:<62}" + "".join(f"{cell:>22}" for cell in cells)
    if shape.dtype == "bfloat16":
        yield (
            "  converted: the linear layers of the blocks; head, attention and memory-bound work stay as "
            "before"
        )
    if run.idle_windows:
        yield f"  {run.idle_windows}"
    low, high = UNSEEN_RUNS
    yield (
        f"  runs that this was not fitted to were {low:g} to {high:g} times as fast as predicted "
        "(docs/plan.md)"
    )
    room = "" if run.fits else ": more than the card has, take a smaller batch"
    yield f"  memory about {run.training_memory_bytes / 1e9:.1f} GB{room}"


def _rows(kinds: Sequence[SoftwarePrediction]) -> Iterator[tuple[str, list[str]]]:
    """Rows of the table, each with a cell for every kind of software."""
    yield (
        "ms for a micro-batch (GFLOP, GB eager)",
        [find_software(kind.software).name for kind in kinds],
    )
    for i, part in enumerate(kinds[0].parts):
        name = f"{part.name} ({part.flops / 1e9:,.0f}, {part.bytes / 1e9:.2f})"
        yield name, [f"{1e3 * kind.parts[i].seconds:.2f}" for kind in kinds]
    if any(kind.waiting_seconds for kind in kinds):
        yield "the GPU waits for the host", [f"{1e3 * kind.waiting_seconds:.2f}" for kind in kinds]
    yield "all", [f"{1e3 * kind.micro_batch_seconds:.2f}" for kind in kinds]
    yield "tok/s", [f"{kind.tokens_per_second:,.0f}" for kind in kinds]
    if any(kind.slowest_tokens_per_second for kind in kinds):
        yield "tok/s on the slowest to the fastest measured card", [_range(kind) for kind in kinds]
    yield "of the bfloat16 peak", [f"{kind.bfloat16_peak_share:.0%}" for kind in kinds]
    yield (
        "the whole run, evaluations left out",
        [format_duration(kind.training_seconds) for kind in kinds],
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


def _range(kind: SoftwarePrediction) -> str:
    slowest, fastest = kind.slowest_tokens_per_second, kind.fastest_tokens_per_second
    if slowest is None or fastest is None:
        return ""
    return f"{slowest:,.0f} to {fastest:,.0f}"


def measured_line(plan: MeasuredPlan) -> str:
    """The plan of a run on this machine."""
    update = plan.update_seconds
    more = " and its update" if update is None else f" and {update:.3f} s for an update"
    return (
        f"this machine, from {plan.micro_batch_seconds:.3f} s measured for a micro-batch{more}: "
        f"{plan.tokens_per_second:,.0f} tok/s, {format_duration(plan.training_seconds)} for the whole run, "
        f"evaluations left out (predicted); {plan.peak_memory_bytes / 1e9:.2f} GB (measured)"
    )


def arm_line(arm: ArmPrediction) -> str:
    """The line of one arm of an experiment on a GPU, with one kind of software."""
    name = qualified_name(arm.arm, arm.condition or "")
    cost = arm.cost
    if cost is None:
        return f"  {name:<44} {arm.obstacle}"
    return (
        f"  {name:<44} {cost.tokens_per_second:>11,.0f} tok/s "
        f"{format_duration(cost.training_seconds):>14} a seed {cost.training_memory_bytes / 1e9:>6.1f} GB"
    )
