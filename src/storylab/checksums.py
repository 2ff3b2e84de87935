"""``SHA256SUMS``: checksums of the files in the folder of a run or a data set.

``sha256sum --check SHA256SUMS`` verifies the files without storylab. The last line, a comment to that
program, has the checksum of the lines above it, so that damage to this file is not taken for damage to
the files that it lists. Folders of earlier versions have no such file; their files are not checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from storylab.errors import UserError
from storylab.files import exists, open_file, write_text

CHECKSUMS = "SHA256SUMS"
# Names of files in the folder, or in a folder in it: nothing that leads elsewhere.
_LINE = re.compile(r"([0-9a-f]{64})  (\w[\w.-]*(?:/\w[\w.-]*)?)", re.ASCII)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        UserError: the file cannot be read.
    """
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Checksums:
    """The checksums of a folder: hex SHA-256 by the name of a file, relative to the folder."""

    folder: Path
    sums: Mapping[str, str] = field(default_factory=dict)

    def require(self, name: str, data: bytes) -> None:
        """Check ``data``, read from the file ``name`` after these checksums were.

        A file without a checksum passes.

        Raises:
            UserError: it is not what the checksum was made from.
        """
        expected = self.sums.get(name)
        if expected is None or hashlib.sha256(data).hexdigest() == expected:
            return
        # A process that continues a run takes a checksum out before it replaces the file.
        if read_checksums(self.folder).sums.get(name) == expected:
            raise altered(self.folder / name)


def altered(path: Path, record: str = CHECKSUMS) -> UserError:
    """The error for a file that differs from the checksum in ``record``."""
    return UserError(
        f"{path} has been altered: its SHA-256 is not the one in {record}; restore it from a copy"
    )


def read_checksums(folder: Path) -> Checksums:
    """The checksums of a folder; none where it has no such file.

    Raises:
        UserError: the file cannot be read, or a byte of it has changed.
    """
    path = folder / CHECKSUMS
    if not exists(path):
        return Checksums(folder)
    with open_file(path) as file:
        data = file.read()
    lines = data.decode("ascii", "replace").splitlines()[:-1]
    found = [_LINE.fullmatch(line) for line in lines]
    sums = {match[2]: match[1] for match in found if match}
    if _text(sums).encode() != data:
        raise UserError(
            f"{path} has been altered: its last line is not the SHA-256 of the lines above it; restore it "
            "from a copy, or delete it to go on without checksums"
        )
    return Checksums(folder, sums)


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    """Replace the checksums of a folder.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(folder / CHECKSUMS, _text(sums))


def add_checksums(folder: Path, names: Iterable[str]) -> None:
    """Add or renew the checksums of files as they are now.

    Raises:
        UserError: a file cannot be read, or the checksums cannot be read or written.
    """
    new = {name: sha256_file(folder / name) for name in names}
    write_checksums(folder, {**read_checksums(folder).sums, **new})


def drop_checksums(folder: Path, names: Iterable[str]) -> None:
    """Take files out of the checksums, before they are changed; without any there is nothing to do.

    Raises:
        UserError: the checksums cannot be read or written.
    """
    sums, gone = read_checksums(folder).sums, set(names)
    if sums.keys() & gone:
        write_checksums(folder, {name: sums[name] for name in sums.keys() - gone})


def _text(sums: Mapping[str, str]) -> str:
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    own = hashlib.sha256(lines.encode()).hexdigest()
    return f"{lines}# SHA-256 of the lines above: {own}\n"
