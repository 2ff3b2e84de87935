"""The right to train a run, so that processes which share run folders do not train it twice at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from storylab.errors import UserError
from storylab.files import exists, make_folder
from storylab.locks import HeldError, exclusive, held

# The folder in RUNS with one folder to lock for each run, which is there before the run folder is.
LOCKS = ".locks"


def lease_folder(run_folder: Path) -> Path:
    """The folder to lock for a run."""
    return run_folder.parent / LOCKS / run_folder.name


def is_taken(run_folder: Path) -> bool:
    """Whether another process, or thread, trains a run: as part of an experiment, or by its folder."""
    return any(_is_held(folder) for folder in (lease_folder(run_folder), run_folder))


@contextlib.contextmanager
def run_lease(run_folder: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold the right to train a run.

    Args:
        run_folder: the run's folder; it need not be there.
        wait: called again and again while another process has the right; it may raise to give up.

    Raises:
        UserError: the lock cannot be made.
    """
    lock = lease_folder(run_folder)
    make_folder(lock)
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive(lock))
            except HeldError:
                wait()
                continue
            while _is_held(run_folder):
                wait()
            yield
            return


def _is_held(folder: Path) -> bool:
    try:
        return exists(folder) and held(folder)
    except UserError:
        return False  # the code that trains the run reports the fault


def wait_for_folder(run_folder: Path, wait: Callable[[], None]) -> None:
    """Call ``wait`` again and again while a process trains the run in a folder, with or without a lease."""
    while _is_held(run_folder):
        wait()
