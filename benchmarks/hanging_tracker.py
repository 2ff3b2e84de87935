"""A tracker that never answers, for tracker_overhead.py; apart, so that its process loads no torch."""

from __future__ import annotations

import time


class Hanging:
    """Sleeps for ever."""

    def __init__(self, run: object) -> None:
        time.sleep(3600)
