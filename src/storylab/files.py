"""Reading and writing files so that every fault names its file and no reader sees half of one; hashes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from storylab.decode import decode
from storylab.errors import UserError

T = TypeVar("T")
READING_REMEDIES = {
    errno.ENOENT: "; check the path, and where it leads if it is a link",
    errno.ENOTDIR: "; check the path: a part of it is a file",
    errno.EACCES: "; make it readable for this user",
    errno.EPERM: "; make it readable for this user",
    errno.ELOOP: "; check the links in the path: they lead in a circle",
    errno.ENAMETOOLONG: "; give a shorter path",
    errno.EIO: "; the disk, or the way to it, may be failing",
    errno.EMFILE: "; raise the limit of open files (ulimit -n)",
    errno.ENFILE: "; close other programs: the system has too many open files",
}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system has against a path into one line that names it.

    Raises:
        UserError: an OSError came from the block.
    """
    try:
        yield
    except OSError as error:
        remedy = READING_REMEDIES.get(error.errno or 0, "")
        raise UserError(f"cannot read {system_words(error, path)}{remedy}") from error


def shown(path: Path | str) -> str:
    """``path`` in one line of printable characters, escaped where a name has others."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


def system_words(error: OSError, path: Path | None = None) -> str:
    """``PATH: Permission denied``: the path that the system names, or else ``path``, and its words."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else path
    words = error.strerror or str(error) or type(error).__name__
    return words if name is None else f"{shown(name)}: {words}"


def exists(path: Path) -> bool:
    """Whether there is anything at ``path``, a link to nowhere included.

    Raises:
        UserError: the system does not let us know.
    """
    with reading(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


@contextmanager
def open_file(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file to read its bytes.

    A folder or device is refused, and so is a pipe, from which nothing might ever come.

    Raises:
        UserError: it cannot be read, or reading broke off.
    """
    with reading(path):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
            raise UserError(f"cannot read {shown(path)}: it is a {kind}, not a file")
        with open(path, "rb") as file:
            yield file


def read_text(path: Path) -> str:
    """Read a file's text, without a byte order mark at its start, its lines ending with ``\\n``.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    with open_file(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"cannot read {path}: it is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; it takes the place of ``path`` when the block ends well.

    Raises:
        UserError: the disk is full or the folder cannot be written; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(
            missing_ok=True
        )  # a kill has left it, or a pipe that would hold the writer
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it is told of already
            temporary.unlink(missing_ok=True)


REMEDIES = {
    errno.ENOENT: "Make the folder that it is to lie in, or choose another",
    errno.ENOTDIR: "Make the folder that it is to lie in, or choose another",
    errno.EISDIR: "Move the folder that has its name, or choose another",
    errno.EEXIST: "Move what has its name, or choose another",
    errno.ELOOP: "Mend the link, or choose another folder",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EACCES: "Choose a folder where you may write, or ask for the right to",
    errno.EPERM: "Choose a folder where you may write, or ask for the right to",
    errno.EROFS: "Choose a folder where you may write",
}


def write_error(path: Path, error: OSError) -> UserError:
    """The user's version of a failed write."""
    remedy = REMEDIES.get(error.errno or 0, "Free some space or choose another folder")
    return UserError(
        f"cannot write {path}: {error.strerror or error}; what was there before is unharmed. "
        f"{remedy}, then run the command again"
    )


def make_folder(folder: Path) -> None:
    """Make a folder with those above it, where there is none yet.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class HeldError(UserError):
    """Another process is at work in a folder."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the lock goes with the process, however it ends.

    Raises:
        HeldError: another process holds it.
        UserError: the folder cannot be opened or locked.
    """
    with reading(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with reading(folder):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HeldError(
                    f"another process is at work in {folder}: wait for it to end"
                ) from None
        yield
    finally:
        os.close(descriptor)


def held(folder: Path) -> bool:
    """Whether another process holds ``folder``.

    Raises:
        UserError: the folder cannot be opened or locked.
    """
    try:
        with exclusive(folder):
            return False
    except HeldError:
        return True


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; bytes of file names that are none become question marks."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, unreadable or not JSON.
    """
    with open_file(path) as file:
        data = file.read()
    try:
        return parse_json(data)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): it has been altered") from error


def parse_json(data: bytes) -> Any:
    """The value that UTF-8 JSON stands for.

    Raises:
        ValueError: it is something else, has NaN or an infinite number, or is nested without end.
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def read_record(path: Path, kind: type[T]) -> T:
    """Read a JSON file that holds a value of type ``kind``, see :func:`storylab.decode.decode`.

    Raises:
        UserError: the file cannot be read, or something in it is missing or of another type.
    """
    with open_file(path) as file:
        data = file.read()
    return decode(kind, data, str(path))


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
