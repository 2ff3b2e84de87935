"""Finished and interrupted runs: their weights, their rows and their summaries, for tests."""

from __future__ import annotations

import signal
from typing import Any

import msgspec
import torch

from storylab.record import checkpoint
from storylab.record.folder import RunFolder
from storylab.record.schema import Summary
from storylab.training.observers import Observer

CPU = torch.device("cpu")


def weights(run: RunFolder) -> str:
    return checkpoint.weights_sha256(checkpoint.load(run.checkpoint("last"))[0])


TIMES = {"tokens_per_second", "step_seconds", "data_seconds", "peak_memory_bytes"}


def found(run: RunFolder) -> Summary:
    """The summary of a run that has ended."""
    summary = run.read_summary()
    assert summary is not None
    return summary


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    """Metrics without what the clock decides."""
    rows = map(msgspec.to_builtins, run.read_rows())
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


class InterruptAt(Observer):
    """Sends this process a signal when an iteration has been done."""

    def __init__(self, iteration: int, number: int) -> None:
        self.iteration, self.number = iteration, number

    def progress(self, name: str, done: int, total: int) -> None:
        if name == "training" and done == self.iteration:
            signal.raise_signal(self.number)
