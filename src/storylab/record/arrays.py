"""Losses by story and by position, as ``.npy`` files of one fixed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from storylab.data.npy import parse_npy
from storylab.errors import UserError
from storylab.files import Check, atomic_path, open_file

# No loss of a story or a position comes near it.
LARGEST_LOSS = 1e40


def write_array(path: Path, array: np.ndarray) -> None:
    """Replace a ``.npy`` file.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path, dimensions: int, check: Check | None = None) -> np.ndarray:
    """Read finite float64 numbers from a ``.npy`` file of one or two dimensions.

    Raises:
        UserError: the file cannot be read, holds something else, or ``check`` refuses it.
    """
    with open_file(path) as file:
        data = file.read()
    found = parse_npy(data, "<f8", dimensions)
    if found is None:
        raise UserError(
            f"{path} is damaged: it is no whole array of float64 of {dimensions} dimensions"
        )
    array = found.astype(np.float64)
    if not np.isfinite(array).all() or (array.size and np.abs(array).max() > LARGEST_LOSS):
        raise UserError(f"{path} is damaged: it has numbers that are not finite, or far too large")
    if check is not None:
        check(data)
    return array
