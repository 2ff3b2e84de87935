"""The C library's memory allocator, set for training on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import sys

# Parameters of mallopt(3) in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
KEEP_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep what tensors have freed, for those to come.

    By default glibc maps every large block anew and gives it back when it is freed, so that a step
    spends a good part of its time on page faults (docs/performance.md). Does nothing elsewhere than
    on Linux with glibc.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # no glibc, such as in Alpine
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
            # What one thread has freed serves the others too.
            libc.mallopt(M_ARENA_MAX, 1)
