"""Settings of the C library's memory allocator for training on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Mapping

# Parameters of mallopt(3) in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
KEEP_BYTES = 2**31 - 1
# The system's limit of mappings is as large.
MOST_MAPPINGS = 65536
SEPARATE_BYTES = 2**20


def keep_freed_memory() -> None:
    """Let this process reuse the memory that tensors free, instead of returning it to the system.

    By default glibc maps every large block separately and unmaps it when it is freed, so that a step
    spends a good part of its time on page faults (docs/performance.md). Only Linux with glibc is
    changed; on other systems the function does nothing.
    """
    # One arena: memory freed by one thread is reused by the others.
    _set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: KEEP_BYTES, M_ARENA_MAX: 1})


def return_freed_memory() -> None:
    """Return the memory of large tensors to the system when they are freed, each from a mapping of its own.

    Where weights are gathered and dropped all the time, between tensors that stay, freed memory is in
    pieces too small for the next large one, and a process holds twice as much as its tensors need.
    """
    _set({M_MMAP_MAX: MOST_MAPPINGS, M_MMAP_THRESHOLD: SEPARATE_BYTES, M_TRIM_THRESHOLD: 0})


def _set(options: Mapping[int, int]) -> None:
    """Set parameters of mallopt by number."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # no glibc, such as in Alpine
            libc = ctypes.CDLL(None)
            for option, value in options.items():
                libc.mallopt(option, value)
