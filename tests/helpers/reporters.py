"""Reporters of an experiment's progress, for tests."""

from __future__ import annotations


class Quiet:
    """Shows nothing."""

    def line(self, text: str) -> None: ...

    def progress(self, name: str, done: int, total: int) -> None: ...

    def overall(self, name: str, done: float, total: float) -> None: ...


class Watcher(Quiet):
    """Keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)
