"""The run folder of a process that must not write: another process of the same run does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from storylab.record.folder import RunFolder
from storylab.record.schema import Row


class SilentFolder(RunFolder):
    """A run folder that drops all that is written to it, and has no rows, as those may be half written."""

    writes: ClassVar[bool] = False

    def read_rows(self) -> list[Row]:
        """No rows."""
        return []

    def sync_metrics(self) -> None:
        """Do nothing."""

    def append(self, file: str, line: str) -> None:
        """Do nothing."""

    def append_rows(self, rows: Iterable[Row]) -> None:
        """Do nothing."""

    def write_array(self, name: str, array: np.ndarray) -> None:
        """Do nothing."""
