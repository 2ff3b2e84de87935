"""Decide when checkpoints are due, and save them without keeping a GPU waiting."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storylab.record import checkpoint
from storylab.record.folder import RunFolder
from storylab.record.stages import prefixes
from storylab.training.run_progress import RunProgress
from storylab.training.state import TrainState
from storylab.training.telemetry import Telemetry


class Checkpoints:
    """The checkpoints of a run: the last weights with the state to resume from, the one before it until
    the run ends, and the best weights."""

    def __init__(
        self, run: RunFolder, state: TrainState, progress: RunProgress, telemetry: Telemetry
    ) -> None:
        self.run, self.state, self.progress, self.telemetry = run, state, progress, telemetry
        self.saver = Saver(state.precision.device, run.writes)
        self._saved_at = time.perf_counter()
        self._saved_iteration: int | None = None

    def save_first(self) -> bool:
        """Save a checkpoint from before any fault unless the run has one; returns whether it saved."""
        ranks = self.state.ranks
        missing = ranks.any(ranks.leads and not self.run.checkpoint("last").exists())
        if missing:
            self.save_last(rewind=self.state.config.on_divergence == "rewind")
        return missing

    @property
    def up_to_date(self) -> bool:
        """Whether the last checkpoint has the current weights."""
        return self._saved_iteration == self.progress.next_iteration

    def minutes_passed(self) -> bool:
        """Whether the config's ``checkpoint_minutes`` have passed since the last save."""
        minutes, ranks = (time.perf_counter() - self._saved_at) / 60, self.state.ranks
        return ranks.any(ranks.leads and minutes >= self.state.config.checkpoint_minutes)

    def save_last(self, rewind: bool = False) -> None:
        """Save the current weights with all that resuming needs; ``rewind`` keeps them to go back to.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        scaler = self.state.scaler.state_dict()
        self.run.sync_metrics()
        state = dataclasses.replace(
            self.progress,
            power=self.telemetry.totals(),
            scaler=scaler,
            prefixes=prefixes(self.run.folder),
        )
        path, previous = self.run.checkpoint("last"), self.run.checkpoint("previous")
        point = self.run.checkpoint("rewind") if rewind else None
        self.saver.save(path, self.state.tensors(), dataclasses.asdict(state), previous, point)
        self._saved_at, self._saved_iteration = time.perf_counter(), self.progress.next_iteration

    def go_back(self) -> None:
        """Let the checkpoint to go back to be the last one.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.run.writes:
            checkpoint.keep(self.run.checkpoint("rewind"), self.run.checkpoint("last"))
            self.run.checkpoint("previous").unlink(missing_ok=True)  # it is ahead of that

    def settle(self) -> None:
        """Wait until all are on the disk at the end of a run, and drop those that only a run under way
        needs.

        Raises:
            UserError: one could not be written.
        """
        self.saver.wait()
        if self.run.writes:
            self.run.checkpoint("previous").unlink(missing_ok=True)
            self.run.checkpoint("rewind").unlink(missing_ok=True)

    def save_best(self, iteration: int, val_loss: float) -> None:
        """Save the current weights as the best ones.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        state = {"iteration": iteration, "val_loss": val_loss}
        self.saver.save(self.run.checkpoint("best"), self.state.model.state_dict(), state)


class Saver:
    """Saves checkpoints: on a CPU at once, on a CUDA device from a copy in a thread.

    The copy is queued on the device after the step that it belongs to, so that the steps after it
    cannot reach it. One checkpoint is written after the other, and one copy of each is kept in
    pinned memory.

    Args:
        device: device of the tensors.
        writes: False saves nothing, as another process of the run does.
    """

    def __init__(self, device: torch.device, writes: bool = True) -> None:
        self._writes = writes
        self._cuda = device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints") if self._cuda else None
        self._writing: dict[Path, Future[None]] = {}
        self._copies: dict[Path, dict[str, Tensor]] = {}

    def save(
        self,
        path: Path,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        previous: Path | None = None,
        point: Path | None = None,
    ) -> None:
        """Write a checkpoint, see :func:`storylab.record.checkpoint.save`.

        An earlier one that failed raises its error here or in :meth:`wait`.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        if not self._writes:
            return
        if self._pool is None:
            checkpoint.save(path, tensors, state, previous, point)
            return
        if path in self._writing:
            self._writing.pop(path).result()  # it still reads the copy
        copies = self._copies.setdefault(path, {})
        for name, tensor in tensors.items():
            if name not in copies:
                copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=True)
            copies[name].copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def write() -> None:
            copied.synchronize()
            checkpoint.save(path, copies, state, previous, point)

        self._writing[path] = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until the saved checkpoints are on the disk.

        Raises:
            UserError: it could not be written.
        """
        for path in list(self._writing):
            self._writing.pop(path).result()

    def close(self) -> None:
        """End the thread after it has written its last checkpoint."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
