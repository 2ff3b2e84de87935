"""A process of its own for one run, so that its memory is its own and a crash ends no experiment.

Reads one JSON request on standard input and writes JSON events, one a line, on standard output.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import torch

from storylab.config import TrainConfig, from_dict
from storylab.data.batches import evaluation_windows
from storylab.data.dataset import load_dataset
from storylab.data.sources import VALIDATION
from storylab.errors import UserError
from storylab.training.evaluation import EVAL_BATCH, window_losses
from storylab.training.loop import (
    SilentReporter,
    Trainer,
    TrainingDiverged,
    TrainingInterrupted,
    resolve_device,
    train,
)
from storylab.training.resume import resume
from storylab.training.run_folder import CONFIG, open_run
from storylab.training.step import training_step
from storylab.training.telemetry import peak_memory_bytes

# Outcomes of a request.
DONE, DIVERGED, FAILED, INTERRUPTED = "done", "diverged", "failed", "interrupted"
OUT_OF_MEMORY, KILLED = "out of memory", "killed"
# Micro-batches and repetitions that a calibration times.
CALIBRATION_BATCHES, CALIBRATION_REPEATS = 2, 3


class _Events:
    """A reporter that passes everything on to the parent process."""

    def line(self, text: str) -> None:
        send("line", text=text)

    def progress(self, name: str, done: int, total: int) -> None:
        send("progress", name=name, done=done, total=total)


def send(event: str, **values: Any) -> None:
    """Write one event."""
    print(json.dumps({"event": event, **values}), flush=True)


def work(action: str, config: TrainConfig) -> None:
    """Train (or go on training), or measure, and send what comes of it."""
    if action == "measure":
        send("measured", **measure(config))
        return
    assert config.out_dir is not None
    if (config.out_dir / CONFIG).exists():
        stored = open_run(config.out_dir).config
        wanted = dataclasses.replace(stored, data_dir=config.data_dir)
        resume(config.out_dir, wanted, _Events())
    else:
        train(config, _Events())


def measure(config: TrainConfig) -> dict[str, float]:
    """Seconds of a micro-batch and of an evaluation batch, and peak memory in bytes, from a few."""
    config, precision = resolve_device(config)
    dataset = load_dataset(config.data_dir)
    dataset.require_window(config.block_size)
    trainer = Trainer(config, dataset, precision, SilentReporter())
    batches = min(CALIBRATION_BATCHES, config.gradient_accumulation_steps)
    batch = trainer.batches(0)[: batches * config.batch_size]
    step = evaluation = float("inf")
    split = dataset.splits[VALIDATION]
    starts = evaluation_windows(split, config.block_size, EVAL_BATCH)
    for _ in range(CALIBRATION_REPEATS):
        start = time.perf_counter()
        if trainer.quantization is not None:
            trainer.quantization.weights_changed()
        training_step(
            trainer.model,
            trainer.optimizers,
            trainer.scaler,
            precision,
            batch,
            micro_batch=config.batch_size,
            learning_rate=0.0,
            grad_clip=config.grad_clip,
        )
        step = min(step, time.perf_counter() - start)
        start = time.perf_counter()
        window_losses(trainer.model, split, starts, config.block_size, precision)
        evaluation = min(evaluation, time.perf_counter() - start)
    windows = -(-len(split) // config.block_size)
    return {
        "micro_batch_seconds": step / batches,
        "evaluation_batch_seconds": evaluation * EVAL_BATCH / len(starts),
        "evaluation_batches": windows / EVAL_BATCH,
        "peak_memory_bytes": peak_memory_bytes(precision.device),
    }


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a device or the machine running out of memory."""
    words = (
        "can't allocate memory",
        "out of memory",
        "not enough memory",
        "Cannot allocate memory",
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        word in str(error) for word in words
    )


def main() -> None:
    """Serve the request on standard input."""
    request = json.load(sys.stdin)
    try:
        work(request["action"], from_dict(request["config"]))
    except TrainingDiverged as stop:
        send("end", outcome=DIVERGED, reason=str(stop))
    except TrainingInterrupted as stop:
        send("end", outcome=INTERRUPTED, reason=str(stop))
    except Exception as error:
        # Whatever it is, it is the result of this arm, and the others go on.
        outcome = OUT_OF_MEMORY if out_of_memory(error) else FAILED
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        send("end", outcome=outcome, reason=kind + (str(error).splitlines() or [""])[0])
        if not isinstance(error, UserError):
            raise
    else:
        send("end", outcome=DONE, reason="")


if __name__ == "__main__":
    main()
