"""Write a folder whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storylab.files import sync_folder, write_error
from storylab.locks import exclusive


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty, locked folder next to ``folder``; it takes its place when the block ends without an
    error.

    Args:
        folder: missing or empty.
        replace: it may have files, which are gone afterwards.

    Raises:
        UserError: the disk is full, the folder cannot be written, or another process writes it.
    """
    partial, before = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "before"))
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with exclusive(partial):
            for left_by_a_kill in partial.iterdir():
                left_by_a_kill.unlink()
            shutil.rmtree(before, ignore_errors=True)
            try:
                yield partial
                if folder.exists() and replace:
                    os.rename(folder, before)
                elif folder.exists():
                    folder.rmdir()  # refuses to lose files
                os.rename(partial, folder)
                sync_folder(folder.parent)
                shutil.rmtree(before, ignore_errors=True)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else folder
        raise write_error(place, error) from error
