"""Trackers that misbehave, each in a process of its own; and one that keeps what it gets."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from storylab.tracking.points import Point, RunEnd
from storylab.tracking.protocol import TrackedRun

HERE = __name__


class Keeping:
    """Writes what it gets to ``kept.jsonl`` in the run's parent folder."""

    def __init__(self, run: TrackedRun) -> None:
        self.place = str(Path(run.folder).parent / "kept.jsonl")
        Path(self.place).write_text("")
        self.keep("config", run.config)

    def keep(self, kind: str, value: object) -> None:
        with Path(self.place).open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, value]) + "\n")

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self.keep("point", [point.step, point.seconds, dict(point.values)])

    def finish(self, end: RunEnd | None) -> None:
        self.keep("end", None if end is None else [end.status, end.step, end.values, end.notes])


class HangsAtStart(Keeping):
    def __init__(self, run: TrackedRun) -> None:
        time.sleep(3600)


class HangsAtLog(Keeping):
    def log(self, points: Sequence[Point]) -> None:
        time.sleep(3600)


class HangsAtEnd(Keeping):
    def finish(self, end: RunEnd | None) -> None:
        time.sleep(3600)


class Killed(Keeping):
    def log(self, points: Sequence[Point]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Fails(Keeping):
    def log(self, points: Sequence[Point]) -> None:
        key = os.environ["STAND_IN_API_KEY"]
        raise ConnectionError(f"401 for key {key} at https://me:pass-word@host/api\nadvice")


class Prints(Keeping):
    """Prints more than a pipe takes."""

    def log(self, points: Sequence[Point]) -> None:
        print("x" * 1_000_000, flush=True)
        os.write(2, b"y" * 1_000_000)
        super().log(points)
