"""Settings of the C library's memory allocator for training on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import sys

# Parameters of mallopt(3) in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
KEEP_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process reuse the memory that tensors free, instead of returning it to the system.

    By default glibc maps every large block separately and unmaps it when it is freed, so that a step
    spends a good part of its time on page faults (docs/performance.md). Only Linux with glibc is
    changed; on other systems the function does nothing.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # no glibc, such as in Alpine
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
            # One arena: memory freed by one thread is reused by the others.
            libc.mallopt(M_ARENA_MAX, 1)
