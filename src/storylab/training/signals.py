"""Stop signals (SIGTERM, Ctrl-C) while unsaved work is under way."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from storylab.errors import StoppedAtOnce

# On Windows a parent process can send Ctrl-Break; SIGTERM ends a process at once there.
STOPPING = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)
]
# A scheduler signals every process of a job, and torchrun and executors pass the signal on to processes
# that have had it already: within these seconds, it is the same request.
RELAY_SECONDS = 1.0


@contextmanager
def stop_signals(note: Callable[[int], None]) -> Iterator[None]:
    """Call ``note`` with the number of the first stop signal that arrives while the block runs.

    A second one is obeyed at once: Ctrl-C raises the usual KeyboardInterrupt, and another signal, later
    than :data:`RELAY_SECONDS` after the first, StoppedAtOnce. Only the main thread can handle signals; in
    another thread the block runs with the handlers unchanged.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: float | None = None

    def handle(number: int, frame: object) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            note(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif now - first >= RELAY_SECONDS:
            raise StoppedAtOnce(number)

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
