"""A process of its own for one run, so that its memory is its own and a crash ends no experiment.

Reads one JSON request on standard input and writes JSON events, one a line, on standard output.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from storylab.config import TrainConfig, from_dict
from storylab.data.batches import evaluation_windows
from storylab.data.dataset import load_dataset
from storylab.data.sources import VALIDATION
from storylab.errors import UserError, out_of_memory
from storylab.record.folder import CONFIG, open_run
from storylab.training.cores import CoreUse
from storylab.training.evaluation import EVAL_BATCH, window_losses
from storylab.training.loop import (
    TrainingDiverged,
    TrainingInterrupted,
    train,
)
from storylab.training.measure import StepTimer, products_seconds
from storylab.training.resume import resume
from storylab.training.telemetry import PowerTotals, Telemetry

# Outcomes of a request.
DONE, DIVERGED, FAILED, INTERRUPTED = "done", "diverged", "failed", "interrupted"
OUT_OF_MEMORY, KILLED = "out of memory", "killed"


class _Events:
    """A reporter that passes everything on to the parent process."""

    def line(self, text: str) -> None:
        send("line", text=text)

    def progress(self, name: str, done: int, total: int) -> None:
        send("progress", name=name, done=done, total=total)


def send(event: str, **values: Any) -> None:
    """Write one event."""
    print(json.dumps({"event": event, **values}), flush=True)


def work(action: str, config: TrainConfig, **options: Any) -> None:
    """Train (or go on training), or measure, and send what comes of it."""
    if action in MEASUREMENTS:
        send("measured", **MEASUREMENTS[action](config, **options))
        return
    assert config.out_dir is not None
    if (config.out_dir / CONFIG).exists():
        stored = open_run(config.out_dir).read_config()
        wanted = dataclasses.replace(stored, data_dir=config.data_dir)
        resume(config.out_dir, wanted, _Events())
    else:
        train(config, _Events())


def measure(config: TrainConfig) -> dict[str, float]:
    """Seconds of a micro-batch, of an update and of an evaluation batch, and peak memory in bytes, from a
    few of each; and how many cores other programs used meanwhile."""
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
    windows = -(-len(split) // config.block_size)
    return {
        "micro_batch_seconds": steps.micro_batch,
        "update_seconds": steps.update,
        "evaluation_batch_seconds": evaluation * EVAL_BATCH / len(starts),
        "evaluation_batches": windows / EVAL_BATCH,
        "peak_memory_bytes": timer.memory(),
        "other_cores": use.read().others,
    }


def bench(config: TrainConfig, vocab_size: int, seconds: float) -> dict[str, Any]:
    """Seconds and joules of a step of one micro-batch, and peak memory; where no library computes low
    precision in operations of its own, the shares of the step's parts; and the seconds of its matrix
    products alone, where they are not quantised."""
    timer = StepTimer(config, vocab_size)
    timer.step(config.batch_size)
    with Telemetry(timer.device, PowerTotals()) as telemetry:
        times = timer.times(config.batch_size, seconds)
        joules = telemetry.latest()["energy_joules"]
    found: dict[str, Any] = {
        "seconds": statistics.median(times),
        "joules": None if joules is None else joules / len(times),
        "memory": timer.memory(),
        "shares": None if timer.precision.hardware else timer.shares(config.batch_size),
        "products": None,
    }
    if timer.precision.recipe is None:
        tokens = config.batch_size * config.block_size
        found["products"] = products_seconds(config, vocab_size, tokens, timer.precision)
    return found


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {"measure": measure, "bench": bench}


def main() -> None:
    """Serve the request on standard input."""
    request = json.load(sys.stdin)
    try:
        work(request["action"], from_dict(request["config"]), **request["options"])
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
