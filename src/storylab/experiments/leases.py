"""The leases of a folder of runs: to train a run, to write records, to judge an experiment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from storylab.errors import UserError
from storylab.files import exists
from storylab.leases import Claimant, Lease, holder_of
from storylab.locks import held
from storylab.tickets import Holder

# The folder in RUNS with one folder for each lease.
LEASES = ".locks"
# Its lease to write records; the records are in a folder of that name, so no run has it.
RECORDS = "experiments"
POLL_SECONDS = 0.05


def lease_folder(run_folder: Path) -> Path:
    """The folder of the lease to train a run; it is there before the run folder is."""
    return run_folder.parent / LEASES / run_folder.name


@contextmanager
def claim_run(claimant: Claimant, run_folder: Path) -> Iterator[Lease | None]:
    """Hold the right to train a run, None if another process trains it: as part of an experiment, or by
    its folder.

    Raises:
        UserError: the lease cannot be read or written.
    """
    with claimant.claim(lease_folder(run_folder)) as lease:
        yield None if lease is not None and _is_held(run_folder) else lease


def trainer_of(run_folder: Path) -> Holder | None:
    """The process that has the right to train a run; it may have ended a moment ago.

    Raises:
        UserError: the lease cannot be read.
    """
    return holder_of(lease_folder(run_folder))


@contextmanager
def claim_judging(claimant: Claimant, record: Path) -> Iterator[Lease | None]:
    """Hold the right to judge the experiment of a record, None if another process has it.

    Raises:
        UserError: the lease cannot be read or written.
    """
    with claimant.claim(record.parent.parent / LEASES / f"{RECORDS}.{record.stem}") as lease:
        yield lease


@contextmanager
def hold_records(runs: Path) -> Iterator[Lease]:
    """Hold the right to write the records in a folder of runs; waits while another process has it.

    Raises:
        UserError: the lease cannot be read or written.
    """
    claimant = Claimant()
    with ExitStack() as stack:
        while True:
            with ExitStack() as attempt:
                lease = attempt.enter_context(claimant.claim(runs / LEASES / RECORDS))
                if lease is not None:
                    stack.push(attempt.pop_all())
                    break
            time.sleep(POLL_SECONDS)
        yield lease


def _is_held(folder: Path) -> bool:
    try:
        return exists(folder) and held(folder)
    except UserError:
        return False  # the code that trains the run reports the fault


def wait_for_folder(run_folder: Path, wait: Callable[[], None]) -> None:
    """Call ``wait`` again and again while a process trains the run in a folder, with or without a lease."""
    while _is_held(run_folder):
        wait()
