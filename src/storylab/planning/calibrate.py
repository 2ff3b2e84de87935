"""What this machine does: a few real training steps on random tokens instead of a card's limits."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch

from storylab.config import TrainConfig
from storylab.model.transformer import Transformer
from storylab.precision.convert import quantize_blocks
from storylab.training.allocator import keep_freed_memory
from storylab.training.loop import resolve_device
from storylab.training.optimizers import build_optimizers
from storylab.training.step import training_step
from storylab.training.telemetry import peak_memory_bytes

# Steps are repeated until this much time has passed, twice at least.
SECONDS = 20.0


@dataclass(frozen=True)
class Measured:
    """Seconds of a micro-batch and of an update, and peak memory in bytes."""

    micro_batch: float
    update: float
    memory: float

    def seconds(self, config: TrainConfig) -> float:
        """Predicted training time of a whole run, evaluations left out."""
        iteration = config.gradient_accumulation_steps * self.micro_batch + self.update
        return (config.max_iters + 1) * iteration


def calibrate(config: TrainConfig, vocab_size: int) -> Measured:
    """Train steps of one and of two micro-batches; what the second adds is a micro-batch.

    Raises:
        UserError: this machine has not got the device or precision.
    """
    config, precision = resolve_device(dataclasses.replace(config, gradient_accumulation_steps=1))
    if precision.device.type == "cpu":
        keep_freed_memory()
    model = Transformer(config.model, vocab_size).to(precision.device)
    state = None
    if precision.recipe is not None:
        state = quantize_blocks(model.blocks, precision.recipe, 0, 1, precision.hardware)
    if config.compile:
        for block in model.blocks:
            block.compile()
    optimizers, scaler = build_optimizers(model, config), precision.grad_scaler()
    generator = torch.Generator().manual_seed(0)
    shape = (2 * config.batch_size, config.block_size + 1)
    batch = torch.randint(vocab_size, shape, generator=generator)
    times: dict[int, list[float]] = {1: [], 2: []}
    started = time.perf_counter()
    while len(times[2]) < 3 or time.perf_counter() - started < SECONDS:
        for count, found in times.items():
            begin = time.perf_counter()
            if state is not None:
                state.weights_changed()
            training_step(
                model,
                optimizers,
                scaler,
                precision,
                batch[: count * config.batch_size],
                micro_batch=config.batch_size,
                learning_rate=0.0,
                grad_clip=config.grad_clip,
            )
            found.append(time.perf_counter() - begin)
    # The first of each warms up.
    one, two = (sorted(found[1:])[len(found[1:]) // 2] for found in times.values())
    micro_batch = max(two - one, one / 2)
    return Measured(micro_batch, max(one - micro_batch, 0.0), peak_memory_bytes(precision.device))
