"""Training batches as a pure function of (data fingerprint, seed, iteration).

There is no iterator to advance or to save: the batch of any iteration can be made at any time, and
it does not depend on the size of micro-batches or on evaluations in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from storylab.data.dataset import Split


def permutation(length: int, key: str) -> np.ndarray:
    """The numbers 0 to length - 1 in an order that ``key`` decides, ``[length]`` int64.

    Sorts the numbers by a hash of each (the SplitMix64 finalizer of Steele, Lea & Flood 2014), so
    that the order depends on arithmetic alone and not on a library's random generator.
    """
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(start)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


class TrainingBatches:
    """Batches of whole windows: every window of the split once per epoch, in a new order each epoch.

    Window w holds tokens w*T to w*T + T, the last one only as a target.

    Args:
        split: training tokens.
        fingerprint: of the data set; it decides the order together with ``seed``.
        seed: of the order.
        block_size: T, tokens in a window.
        sequences: windows in the batch of one iteration.
    """

    def __init__(
        self, split: Split, fingerprint: str, seed: int, block_size: int, sequences: int
    ) -> None:
        self.split, self.block_size, self.sequences = split, block_size, sequences
        self.windows_per_epoch = (len(split) - 1) // block_size
        self._key = f"{fingerprint}:{seed}"
        # A batch touches two epochs at most unless an epoch is smaller than a batch.
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return permutation(self.windows_per_epoch, f"{self._key}:{epoch}")

    @property
    def unseen(self) -> int:
        """Tokens at the end of the split that are in no window as a target, so never trained on."""
        return len(self.split) - 1 - self.windows_per_epoch * self.block_size

    def windows(self, iteration: int) -> np.ndarray:
        """Numbers of the windows in the batch of ``iteration``, ``[sequences]`` int64."""
        first = iteration * self.sequences
        epochs, places = np.divmod(np.arange(first, first + self.sequences), self.windows_per_epoch)
        chosen = np.empty(self.sequences, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._order(int(epoch))[places[here]]
        return chosen

    def __call__(self, iteration: int) -> torch.Tensor:
        """The batch of ``iteration``: ``[sequences, T + 1]`` int64, inputs and targets overlapping."""
        starts = self.windows(iteration) * self.block_size
        return torch.from_numpy(self.split.windows(starts, self.block_size + 1))

    def epochs(self, iterations: int) -> float:
        """Epochs that ``iterations`` iterations read."""
        return iterations * self.sequences / self.windows_per_epoch


class Prefetcher:
    """Makes the batch of the next iteration in a thread while the model works on this one.

    ``pin`` puts it into memory from which a GPU copies without the host waiting.
    """

    def __init__(self, make: Callable[[int], torch.Tensor], pin: bool = False) -> None:
        self._make = (lambda iteration: make(iteration).pin_memory()) if pin else make
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[torch.Tensor]] | None = None

    def __call__(self, iteration: int) -> torch.Tensor:
        """The batch of ``iteration``; quick only if iterations are asked for in order."""
        ready = self._next
        in_order = ready is not None and ready[0] == iteration
        batch = ready[1].result() if ready is not None and in_order else self._make(iteration)
        self._next = iteration + 1, self._pool.submit(self._make, iteration + 1)
        return batch

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def evaluation_windows(split: Split, block_size: int, count: int) -> np.ndarray:
    """Where ``count`` evaluation windows begin, ``[<= count]`` int64: spread evenly, always the same.

    They depend on the split's length alone, not on a seed, a batch size or the training order.
    """
    available = (len(split) - 1) // block_size
    if count >= available:
        return np.arange(available) * block_size
    return (np.arange(count) * available // count) * block_size
