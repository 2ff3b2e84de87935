"""Read and write files. Every error names its path; no reader sees half of a file."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from storylab.decode import decode
from storylab.errors import UserError

T = TypeVar("T")
Check = Callable[[bytes], None]  # raises a UserError for bytes that are not those written

FOLDERS_OPEN = os.name != "nt"  # whether a folder has a descriptor, to be locked and synced by
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
    """Turn an OSError from the block into a UserError: one line that names the path.

    Raises:
        UserError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        remedy = READING_REMEDIES.get(error.errno or 0, "")
        raise UserError(f"cannot read {system_words(error, path)}{remedy}") from error


def shown(path: Path | str) -> str:
    """``path`` as one line of printable characters; others are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


def system_words(error: OSError, path: Path | None = None) -> str:
    """``PATH: Permission denied``: the path that the error names (else ``path``), and its message."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else path
    words = error.strerror or str(error) or type(error).__name__
    return words if name is None else f"{shown(name)}: {words}"


def exists(path: Path) -> bool:
    """Whether there is anything at ``path``; a dangling link counts.

    Raises:
        UserError: the system refuses to say.
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

    Folders, devices and pipes are refused: reading a pipe might never end.

    Raises:
        UserError: the file cannot be read, or reading failed on the way.
    """
    with reading(path):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
            raise UserError(f"cannot read {shown(path)}: it is a {kind}, not a file")
        with open(path, "rb") as file:
            yield file


def read_text(path: Path) -> str:
    """Read a file's text. A byte order mark is dropped, and every line ends with ``\\n``.

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
    """Yield a temporary sibling to write to; it replaces ``path`` when the block ends without an error.

    Raises:
        UserError: the disk is full or the folder cannot be written; ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # A killed process may have left one, and a pipe of this name would block the writer.
        temporary.unlink(missing_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # the first error is already on its way
            temporary.unlink(missing_ok=True)


REMEDIES = {
    errno.ENOENT: "Make the folder above it, or choose another",
    errno.ENOTDIR: "Make the folder above it, or choose another",
    errno.EISDIR: "Move the folder of that name, or choose another",
    errno.EEXIST: "Move the file of that name, or choose another",
    errno.ELOOP: "Correct the link, or choose another folder",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EACCES: "Choose a folder where you may write, or ask for the right to",
    errno.EPERM: "Choose a folder where you may write, or ask for the right to",
    errno.EROFS: "Choose a folder where you may write",
}


def write_error(path: Path, error: OSError) -> UserError:
    """The UserError for a failed write: path, reason and remedy."""
    remedy = REMEDIES.get(error.errno or 0, "Free some space or choose another folder")
    return UserError(
        f"cannot write {path}: {error.strerror or error}; an earlier version of it is unharmed. "
        f"{remedy}, then run the command again"
    )


def make_folder(folder: Path) -> None:
    """Make a folder, and the folders above it, unless it exists.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut, where the system lets folders be opened."""
    if not FOLDERS_OPEN:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; surrogates (undecodable file names) become question marks."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def read_json(path: Path, check: Check | None = None) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, unreadable or not JSON, or ``check`` refuses it.
    """
    with open_file(path) as file:
        data = file.read()
    value = json_of(data, path)
    if check is not None:
        check(data)
    return value


def json_of(data: bytes, path: Path) -> Any:
    """Decode the JSON of a file that has been read.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return parse_json(data)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): it has been altered") from error


def parse_json(data: bytes) -> Any:
    """Decode UTF-8 JSON.

    Raises:
        ValueError: it is not JSON, has NaN or an infinite number, or is nested too deep.
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def read_record(path: Path, kind: type[T], check: Check | None = None) -> T:
    """Read a JSON file that holds a value of type ``kind``, see :func:`storylab.decode.decode`.

    Raises:
        UserError: the file cannot be read, something in it is missing or of another type, or ``check``
            refuses it.
    """
    with open_file(path) as file:
        data = file.read()
    value = decode(kind, data, str(path))
    if check is not None:
        check(data)
    return value
