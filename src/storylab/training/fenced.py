"""A run that is trained under a lease: it stops before a write once the lease may be another's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storylab.leases import Fence
from storylab.locks import HeldError, exclusive
from storylab.record.folder import RunFolder
from storylab.training.ranks import Ranks

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class FencedFolder(RunFolder):
    """A run folder whose fence is checked before a write.

    Rows or a line precede every checkpoint and the summary, so the fence is checked shortly before each.
    """

    fence: Fence | None = None

    def sync_metrics(self) -> None:
        """See :class:`~storylab.record.folder.RunFolder`."""
        self._check()
        super().sync_metrics()

    def append(self, file: str, line: str) -> None:
        """See :class:`~storylab.record.folder.RunFolder`."""
        self._check()
        super().append(file, line)

    def write_array(self, name: str, array: np.ndarray) -> None:
        """See :class:`~storylab.record.folder.RunFolder`."""
        self._check()
        super().write_array(name, array)

    def _check(self) -> None:
        if self.fence is not None:
            self.fence.check()


class FencedProcess(Ranks):
    """The only process of a run, which trains it under a lease.

    Args:
        fence: of the lease.
    """

    def __init__(self, fence: Fence) -> None:
        self._fence = fence

    def folder(self, folder: Path) -> RunFolder:
        """The run folder, about to be written.

        Raises:
            LeaseLost: another process has the lease.
        """
        self._fence.check()
        return FencedFolder(folder, fence=self._fence)

    @contextmanager
    def hold(self, folder: Path) -> Iterator[None]:
        """Hold the run folder. A process that has lost the lease may hold it until it notices: wait then.

        Raises:
            LeaseLost: another process has the lease.
        """
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(exclusive(folder))
                    break
                except HeldError:
                    self._fence.check()
                    time.sleep(POLL_SECONDS)
            yield
