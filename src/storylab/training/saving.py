"""Writing checkpoints without keeping a GPU waiting."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storylab.record import checkpoint


class Saver:
    """Saves checkpoints: on a CPU at once, on a CUDA device from a copy in a thread.

    The copy is queued on the device behind the step that it belongs to, so that the steps after it cannot
    reach it. One checkpoint is written after the other, and one copy of each is kept in pinned memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints") if self._cuda else None
        self._writing: dict[Path, Future[None]] = {}
        self._copies: dict[Path, dict[str, Tensor]] = {}

    def save(self, path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint; what went wrong with those before comes to light here or in :meth:`wait`.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        if self._pool is None:
            checkpoint.save(path, tensors, state)
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
            checkpoint.save(path, copies, state)

        self._writing[path] = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            UserError: it could not be written.
        """
        for path in list(self._writing):
            self._writing.pop(path).result()

    def close(self) -> None:
        """End the thread, when it has written what it was given."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
