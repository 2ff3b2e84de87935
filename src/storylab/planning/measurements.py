"""The actions that time training steps, for a worker: a process that nothing else has warmed or filled."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import torch

from storylab.config import TrainConfig
from storylab.data.batches import evaluation_windows
from storylab.data.dataset import load_dataset
from storylab.data.layout import TEST, VALIDATION
from storylab.execution.job import OnEvent
from storylab.planning.estimate import Calibration
from storylab.training.cores import CoreUse
from storylab.training.evaluation import EVAL_BATCH, window_losses
from storylab.training.measure import StepTimer, products_seconds, shares_of
from storylab.training.telemetry import PowerTotals, Telemetry


def calibrate(config: TrainConfig, on_event: OnEvent) -> dict[str, Any]:
    """Time a few micro-batches, updates and evaluation batches of a run.

    Args:
        config: the run, with its data set.
        on_event: not called; it is over in seconds.

    Returns:
        The fields of a :class:`storylab.planning.estimate.Calibration`.

    Raises:
        UserError: the data set or the device cannot be used.
    """
    dataset = load_dataset(config.data_dir)
    dataset.require_window(config.block_size)
    use = CoreUse()
    timer = StepTimer(config, dataset.vocab_size)
    steps = timer.measured(0.0, least=2)
    split = dataset.splits[VALIDATION]
    starts = evaluation_windows(split, config.block_size, EVAL_BATCH)
    evaluation = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        with torch.compiler.set_stance("force_eager"):  # as training evaluates
            window_losses(timer.model, split, starts, config.block_size, timer.precision)
        evaluation = min(evaluation, time.perf_counter() - start)
    tokens = dataset.tokens
    whole = [VALIDATION, TEST] if dataset.has_test else [VALIDATION]
    windows = sum(-(-tokens[name] // config.block_size) for name in whole)
    calibration = Calibration(
        micro_batch_seconds=steps.micro_batch,
        update_seconds=steps.update,
        evaluation_batch_seconds=evaluation * EVAL_BATCH / len(starts),
        evaluation_batches=windows / EVAL_BATCH,
        peak_memory_bytes=timer.memory(),
        other_cores=use.read().others,
    )
    return asdict(calibration)


def time_steps(
    config: TrainConfig, on_event: OnEvent, vocab_size: int, seconds: float
) -> dict[str, Any]:
    """Time steps of one micro-batch on random tokens.

    Args:
        config: the run; its data set is not read.
        on_event: not called.
        vocab_size: number of token ids.
        seconds: how long to repeat the step.

    Returns:
        ``seconds`` and ``joules`` (or None) of a step; ``memory``, its peak in bytes; ``shares`` of the
        step's parts, or None if a library computes low precision by operations that the rules do
        not know; ``busy``, the share of the step in which a GPU worked, None where nothing says it; and
        ``products``, the seconds of its matrix products alone, or None where they are quantized.

    Raises:
        UserError: this machine lacks the device or the precision.
    """
    timer = StepTimer(config, vocab_size)
    timer.step(config.batch_size)
    with Telemetry(timer.device, PowerTotals()) as telemetry:
        times = timer.times(config.batch_size, seconds)
        joules = telemetry.latest()["energy_joules"]
    found: dict[str, Any] = dict.fromkeys(("shares", "busy", "products"))
    found["seconds"] = statistics.median(times)
    found["joules"] = None if joules is None else joules / len(times)
    found["memory"] = timer.memory()
    if timer.precision.hardware is None:
        parts = timer.part_seconds(config.batch_size)
        found["shares"] = shares_of(parts)
        if timer.device.type == "cuda":  # the rest waits for the host
            found["busy"] = min(sum(parts.values()) / found["seconds"], 1.0)
    if timer.precision.recipe is None:
        tokens = config.batch_size * config.block_size
        found["products"] = products_seconds(config, vocab_size, tokens, timer.precision)
    return found
