"""A table of training steps timed on this machine, in every precision and attention pattern."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from storylab.config import NATIVE_DTYPES, WIDENING_DTYPES, Dtype, ModelConfig, TrainConfig
from storylab.errors import UserError
from storylab.execution.job import Executor, Job, run_interruptibly
from storylab.model.cost import StepPart, training_flops
from storylab.planning.gpus import Gpu, known_gpu
from storylab.planning.roofline import predicted_shares
from storylab.planning.software import SOFTWARE
from storylab.precision.edit import find_recipe
from storylab.training.setup import resolve_device

# Sequences in a micro-batch on a CPU where nothing else is said, so that a step takes about a second.
CPU_SEQUENCES = 8
COLUMNS = ("tok/s", "TFLOP/s", "of peak", "of products alone", "GPU busy", "memory", "J/Mtok")


def variants(
    config: TrainConfig, dtypes: Sequence[Dtype], attentions: Sequence[str]
) -> Iterator[TrainConfig]:
    """The configs that are timed: every dtype with the config's attention, and bfloat16, or the first
    dtype, with each of the other attentions."""

    def timed(dtype: Dtype, model: ModelConfig) -> TrainConfig:
        # A wide dtype has no recipe to change, and nothing but torch to compute it.
        plain: dict[str, Any] = {"recipe": "", "backend": "auto"} if dtype in NATIVE_DTYPES else {}
        if dtype in WIDENING_DTYPES:
            model = dataclasses.replace(model, residual_dtype="float32")
        return dataclasses.replace(config, dtype=dtype, model=model, **plain)

    for dtype in dtypes:
        yield timed(dtype, config.model)
    first: Dtype = "bfloat16" if "bfloat16" in dtypes else dtypes[0]
    for attention in attentions:
        model = dataclasses.replace(config.model, attention=attention)
        if attention != config.model.attention:
            yield timed(first, model)


def bench_lines(
    configs: Sequence[TrainConfig], vocab_size: int, seconds: float, executor: Executor
) -> Iterator[str]:
    """A header, then two lines for each config as soon as it is measured: speeds, and the shares of its
    step's parts.

    Args:
        configs: see :func:`variants`.
        vocab_size: number of token ids.
        seconds: time for steps, shared by all configs.
        executor: measures each config in a separate job.

    Raises:
        Interrupted: a signal stopped it.
    """
    yield f"{'':<28}" + "".join(f"{name:>18}" for name in COLUMNS)
    for config in configs:
        name = _name(config)
        try:
            resolved, _ = resolve_device(config)
        except UserError as error:
            yield f"{name:<28}  cannot run here: {error}"
            continue
        options = {"vocab_size": vocab_size, "seconds": seconds / len(configs)}
        outcome = run_interruptibly(executor, Job("bench", resolved, options))
        found = outcome.answer
        if found is None:
            yield f"{name:<28}  failed: {outcome.reason}"
            continue
        cells = _cells(resolved, vocab_size, found)
        yield f"{name:<28}" + "".join(f"{cell:>18}" for cell in cells)
        yield "    " + shares_line(found["shares"], resolved, vocab_size, gpu_of(resolved))


def shares_line(
    shares: dict[str, float] | None, config: TrainConfig, vocab_size: int, gpu: Gpu | None
) -> str:
    """Share of a step's time that each part takes, with the predicted share next to the measured
    one if the GPU is known and the plan covers the config. Parts of 0 % are left out."""
    if shares is None:
        return f"no parts: the operations of {config.backend} cannot be distinguished"
    predicted: dict[StepPart, float] = {}
    if gpu is not None and config.dtype != "float32" and config.backend != "emulated":
        software = SOFTWARE["compiled" if config.compile else "eager"]
        recipe = find_recipe(config.dtype, config.recipe)
        predicted = predicted_shares(config, vocab_size, gpu, software, recipe)
    cells = []
    for part in StepPart:
        if max(shares[part], predicted.get(part, 0.0)) >= 0.005:
            beside = f" (predicted {predicted[part]:.0%})" if predicted else ""
            cells.append(f"{part} {shares[part]:.0%}{beside}")
    return ", ".join(cells)


def _name(config: TrainConfig) -> str:
    return f"{config.dtype}, {config.model.attention}" + (", compiled" if config.compile else "")


def _cells(config: TrainConfig, vocab_size: int, found: dict[str, Any]) -> list[str]:
    tokens = config.batch_size * config.block_size
    flops = training_flops(config.model, vocab_size, config.block_size) * tokens
    rate = flops / found["seconds"]
    peak = peak_rate(config)
    alone, joules = found["products"], found["joules"]
    return [
        f"{tokens / found['seconds']:,.0f}",
        f"{rate / 1e12:.3f}",
        f"{rate / peak:.0%}" if peak else "unknown",
        f"{alone / found['seconds']:.0%}" if alone else "",
        "" if found["busy"] is None else f"{found['busy']:.0%}",
        f"{found['memory'] / 1e9:.2f} GB",
        "not available" if joules is None else f"{1e6 * joules / tokens:,.0f}",
    ]


def peak_rate(config: TrainConfig) -> float | None:
    """Peak FLOP/s of the device in the config's precision; None where unknown."""
    gpu = gpu_of(config)
    if gpu is None or config.dtype == "float32" or config.backend == "emulated":
        return None
    recipe = find_recipe(config.dtype, config.recipe)
    rate = gpu.tflops.get(recipe.matrix_unit if recipe else "bfloat16")
    return rate * 1e12 if rate else None


def gpu_of(config: TrainConfig) -> Gpu | None:
    """The listed GPU that a config with its device filled in computes on; None if there is none."""
    device = torch.device(config.device)
    return known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
