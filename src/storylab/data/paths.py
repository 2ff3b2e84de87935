"""Paths that a user gave: whatever the file system says about one becomes a line that names it."""

from __future__ import annotations

import errno
import hashlib
import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storylab.errors import UserError

_REMEDIES = {
    errno.ENOENT: "check the path, and where it leads if it is a link",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EACCES: "make it readable for this user",
    errno.EPERM: "make it readable for this user",
    errno.ELOOP: "check the links in the path: they lead in a circle",
    errno.ENAMETOOLONG: "give a shorter path",
}


def shown(path: Path | str) -> str:
    """``path`` in one line of printable characters, escaped where a name has others."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn the file system's errors into a UserError that names the path and a remedy."""
    try:
        yield
    except OSError as error:
        place = shown(error.filename if isinstance(error.filename, str) else path)
        reason = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "copy it to a place that can be read")
        raise UserError(f"cannot read {place}: {reason}; {remedy}") from error


def open_file(path: Path) -> io.BufferedReader:
    """Open a regular file for reading bytes. A pipe is refused: opening one may wait for ever.

    Raises:
        UserError: it cannot be read, or is a folder, a pipe or a device.
    """
    with file_errors(path):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
            raise UserError(
                f"{shown(path)} is a {what}: give a file, which can be read more than once"
            )
        return open(path, "rb")


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        UserError: it cannot be read.
    """
    with open_file(path) as file, file_errors(path):
        return hashlib.file_digest(file, "sha256").hexdigest()
