"""Leases: a right that one process has at a time, among processes on all machines that share a folder.

The folder of a lease has tickets: files with numbers for names. A ticket holds a line about its holder, and
a word that the holder changes to show that it lives. An empty ticket is released. A process takes the right
in four steps:

1. It reads all tickets. The right is free if all of them are released, or if none has changed for as long
   as they say, by the clock of the reader.
2. It creates the next number (O_EXCL), so that one of several wins, and writes its line.
3. It reads the other tickets again, and gives up unless they are as in step 1.
4. It removes them. Only lower numbers are ever removed, so that a late removal hits no later ticket.

A holder renews its ticket: it changes the word, then looks for a higher number, and has lost the right if
there is one, or if its own ticket has gone. Of a renewal and step 2 of somebody else, one sees the other. A
holder that was suspended for long therefore notices before it goes on (:class:`Fence`). A clock is compared
with itself alone, so clocks may differ between machines.

Needed of the file system: exclusive creation, and that opening a file finds it as others have closed or
removed it. NFS promises both. Locks are not needed; on one machine they tell at once that a holder ended.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM

from storylab.errors import Interrupted
from storylab.files import exists, make_folder, write_error
from storylab.locks import HeldError, exclusive
from storylab.tickets import (
    Holder,
    Tickets,
    machine_of,
    read_tickets,
    ticket_holder,
    ticket_numbers,
    write_ticket,
)

# Longer than the 60 seconds for which clients of NFS may believe what they have read of a folder.
EXPIRY_SECONDS = 120.0
# Renewals within that time.
RENEWALS = 6
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class LeaseLost(Interrupted):
    """Another process has the right by now, so this one must not write any more."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"another process has taken over {folder.name}, as this one seemed to have ended",
            SIGTERM,
        )


@dataclass(frozen=True)
class Lease:
    """A right as its holder has it; it can be handed to another process as plain values."""

    ticket: str
    """Path of the file."""
    line: str
    expiry: float

    def renew(self) -> None:
        """Show that the holder lives.

        Raises:
            LeaseLost: another process has the right.
            OSError: the file cannot be written.
        """
        path, line = Path(self.ticket), self.line.encode()
        try:
            with open(path, "r+b") as file:
                if file.read(len(line)) != line:
                    raise LeaseLost(path.parent)
                file.write(secrets.token_hex(8).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno in _GONE:
                raise LeaseLost(path.parent) from None
            raise
        if any(number > int(path.name) for number in ticket_numbers(path.parent)):
            raise LeaseLost(path.parent)

    def release(self) -> None:
        """Free the right, if the holder still has it."""
        line = self.line.encode()
        with suppress(OSError), open(self.ticket, "r+b") as file:
            if file.read(len(line)) == line:
                file.truncate(0)


class Fence:
    """Keeps a holder from writing once its right may be another's.

    Before each write call :meth:`check`. It renews the lease where the last renewal was too long ago. So a
    write comes at most a sixth of the lease's expiry after a renewal, unless the process was suspended
    between the check and the write.

    Args:
        lease: the right to write.
    """

    def __init__(self, lease: Lease) -> None:
        self._lease, self._renewed = lease, -float("inf")

    def check(self) -> None:
        """Renew the lease if it is time.

        Raises:
            LeaseLost: another process has the right, or the lease could not be renewed for half of its
                expiry.
        """
        now = _clock()
        if now - self._renewed < self._lease.expiry / RENEWALS:
            return
        try:
            self._lease.renew()
        except OSError as error:
            if now - self._renewed < self._lease.expiry / 2:
                return
            raise LeaseLost(Path(self._lease.ticket).parent) from error
        self._renewed = now


class Claimant:
    """Takes leases for this process, and remembers since when those of others have not changed.

    Args:
        expiry: seconds without a renewal after which others may take a lease of this process.
        locks: whether locks between processes of this machine are used.
    """

    def __init__(self, expiry: float = EXPIRY_SECONDS, locks: bool = True) -> None:
        self._expiry, self._locks = expiry, locks
        self._seen: dict[Path, tuple[Tickets, float]] = {}

    @contextmanager
    def claim(self, folder: Path) -> Iterator[Lease | None]:
        """Hold the right of which ``folder`` has the tickets, renewed by a thread; None if another has it.

        Raises:
            UserError: the folder cannot be made, locked, read or written.
        """
        make_folder(folder)
        with ExitStack() as stack:
            lease = self._take(folder) if self._lock(folder, stack) else None
            if lease is not None:
                stack.callback(lease.release)
                stack.enter_context(_renewing(lease))
            yield lease

    def _lock(self, folder: Path, stack: ExitStack) -> bool:
        try:
            if self._locks:
                stack.enter_context(exclusive(folder))
        except HeldError:
            return False
        return True

    def _take(self, folder: Path) -> Lease | None:
        seen = read_tickets(folder)
        if not self._is_free(folder, seen):
            return None
        path = folder / str(max(seen, default=0) + 1)
        try:
            line = write_ticket(path, self._expiry)
        except FileExistsError:
            return None
        except OSError as error:
            if error.errno in _GONE:  # a later claimant has removed it
                return None
            raise write_error(path, error) from error
        lease = Lease(str(path.absolute()), line, self._expiry)
        found = read_tickets(folder)
        found.pop(int(path.name), None)
        if found != seen:
            lease.release()
            return None
        self._seen.pop(folder, None)
        for number in seen:
            with suppress(OSError):  # the next holder removes it
                (folder / str(number)).unlink(missing_ok=True)
        return lease

    def _is_free(self, folder: Path, seen: Tickets) -> bool:
        held = [ticket_holder(content) for content in seen.values() if content]
        if self._locks:
            # Who had the lock that this process holds now has ended.
            here = machine_of(folder)
            held = [holder for holder in held if holder is None or holder.machine != here]
        if not held:
            return True
        before = self._seen.get(folder)
        if before is None or before[0] != seen:
            self._seen[folder] = seen, _clock()
            return False
        expiry = max([self._expiry, *(holder.expiry for holder in held if holder is not None)])
        return _clock() - before[1] >= expiry


def holder_of(folder: Path) -> Holder | None:
    """The process that has the right of which ``folder`` has the tickets; it may have ended a moment ago.

    Raises:
        UserError: the folder cannot be read.
    """
    seen = read_tickets(folder) if exists(folder) else {}
    return next((ticket_holder(seen[n]) for n in sorted(seen, reverse=True) if seen[n]), None)


@contextmanager
def _renewing(lease: Lease) -> Iterator[None]:
    """Renew a lease from a thread while the block runs, until it is lost."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(lease.expiry / RENEWALS):
            try:
                lease.renew()
            except LeaseLost:
                return  # the holder finds this by its fence
            except OSError:
                continue  # the way to the disk may come back in time

    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _clock() -> float:
    """Seconds of a clock that nobody sets; on Linux one that goes on while the machine sleeps."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
