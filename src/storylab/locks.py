"""Lock folders, so that two processes do not work in one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from storylab import files
from storylab.errors import UserError
from storylab.files import exists, reading


class HeldError(UserError):
    """Another process is at work in a folder."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process while the block runs.

    The system releases the lock when the process ends, however it ends. The lock is on the folder itself;
    on Windows, which opens no folders, it is on a hidden file next to it (:func:`lock_file`).

    Raises:
        HeldError: another process holds it.
        UserError: the folder cannot be opened or locked.
    """
    place = folder if files.FOLDERS_OPEN else lock_file(folder)
    with reading(folder), contextlib.ExitStack() as undo:
        descriptor = _open_lock(folder, place)
        undo.callback(os.close, descriptor)
        if not lock_descriptor(descriptor, blocking=False):
            raise HeldError(f"another process is at work in {folder}: wait for it to end")
        undo.pop_all()
    try:
        yield
    finally:
        os.close(descriptor)
        if place != folder:
            with contextlib.suppress(OSError):  # another process has opened it since
                place.unlink()


def lock_file(folder: Path) -> Path:
    """The hidden file that is locked in place of ``folder`` where folders cannot be opened.

    It is a sibling of the folder, so that the folder can be renamed while the lock is held.
    """
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def _open_lock(folder: Path, place: Path) -> int:
    """A descriptor to lock; opening fails where ``folder`` is missing or no folder."""
    if not stat.S_ISDIR(folder.stat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    flags = os.O_RDONLY if place == folder else os.O_RDWR | os.O_CREAT
    return os.open(place, flags)


def held(folder: Path) -> bool:
    """Whether another process holds ``folder``.

    Raises:
        UserError: the folder cannot be opened or locked.
    """
    if not files.FOLDERS_OPEN and folder.is_dir() and not exists(lock_file(folder)):
        return False
    try:
        with exclusive(folder):
            return False
    except HeldError:
        return True
