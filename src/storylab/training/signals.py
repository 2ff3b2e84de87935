"""Stop signals (SIGTERM, Ctrl-C) while unsaved work is under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# On Windows a parent process can send Ctrl-Break; SIGTERM ends a process at once there.
STOPPING = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)
]


@contextmanager
def stop_signals(note: Callable[[int], None]) -> Iterator[None]:
    """Call ``note`` with the number of a stop signal that arrives while the block runs.

    A second Ctrl-C raises the usual KeyboardInterrupt. Only the main thread can handle signals; in
    another thread the block runs with the handlers unchanged.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        note(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
