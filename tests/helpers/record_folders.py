"""The runs of a small experiment, and a count of the files that are opened, for tests."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storylab.checksums import CHECKSUMS


def forget_checksums(root: Path) -> None:
    """Turn the runs and data sets below ``root`` into some without checksums, as earlier versions wrote
    them: a test may edit their files and is not stopped by the first check."""
    for path in root.rglob(CHECKSUMS):
        path.unlink()


def folders(place: Path) -> list[Path]:
    return sorted((place / "runs").glob("nano-*"))


class Opened:
    """Counts the files that this process opens, while it is switched on."""

    def __init__(self) -> None:
        self.on, self.paths = False, Counter[str]()
        sys.addaudithook(self._note)  # it cannot be removed again

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(args[0], str):
            self.paths[args[0]] += 1

    @contextmanager
    def under(self, folder: Path) -> Iterator[Counter[str]]:
        """How often each file under ``folder`` has been opened, once the block has ended."""
        self.paths.clear()
        found: Counter[str] = Counter()
        self.on = True
        try:
            yield found
        finally:
            self.on = False
            for path, count in self.paths.items():
                if path.startswith(str(folder)) and Path(path).is_file():
                    found[path] = count
