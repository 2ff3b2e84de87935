"""Tickets: the files of a lease, see :mod:`storylab.leases`."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from msgspec import Struct

from storylab.decode import decode
from storylab.errors import UserError
from storylab.files import exists, open_file, reading

# Enough for a holder's line.
MOST_BYTES = 4096
_NUMBER = re.compile(r"[1-9]\d{0,17}", re.ASCII)

Tickets = dict[int, bytes]
"""Content by number."""


class Holder(Struct, frozen=True):
    """The line of a ticket."""

    host: str
    machine: str
    """Equal for processes whose locks on the folder see each other."""
    pid: int
    since: str
    expiry: float
    """Seconds without a change after which the right is free."""
    token: str
    """Makes the line one of its kind."""


def ticket_numbers(folder: Path) -> list[int]:
    """The numbers of all tickets in a folder.

    Raises:
        UserError: the folder cannot be read.
    """
    with reading(folder), os.scandir(folder) as entries:
        return [int(entry.name) for entry in entries if _NUMBER.fullmatch(entry.name)]


def read_tickets(folder: Path) -> Tickets:
    """All tickets in a folder.

    Raises:
        UserError: the folder or a ticket cannot be read.
    """
    found = {}
    for number in ticket_numbers(folder):
        path = folder / str(number)
        try:
            with open_file(path) as file:
                found[number] = file.read(MOST_BYTES)
        except UserError:
            if exists(path):
                raise
    return found


def ticket_holder(content: bytes) -> Holder | None:
    """The holder by the content of a ticket; None if it cannot be read."""
    with suppress(UserError):
        return decode(Holder, content.partition(b"\n")[0], "ticket")
    return None


def write_ticket(path: Path, expiry: float) -> str:
    """Create a ticket of this process; returns its line.

    Args:
        path: the file.
        expiry: seconds without a change after which the right is free.

    Raises:
        FileExistsError: another process has this number.
        OSError: the file cannot be written.
    """
    values = {
        "host": socket.gethostname(),
        "machine": machine_of(path.parent),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "expiry": expiry,
        "token": secrets.token_hex(16),
    }
    line = json.dumps(values) + "\n"
    with open(path, "xb") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
    return line


def machine_of(folder: Path) -> str:
    """A name for this system and the mount that ``folder`` is on, within which locks are seen."""
    with reading(folder):
        return f"{_system()}:{folder.stat().st_dev}"


@cache
def _system() -> str:
    """A name for the running kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
