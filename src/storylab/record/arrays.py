"""Losses by story and by position, as ``.npy`` files of one fixed form."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from storylab.errors import UserError
from storylab.files import Check, atomic_path, open_file

# No loss of a story or a position comes near it.
LARGEST_LOSS = 1e40
ARRAY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f8', 'fortran_order': False, "
    rb"'shape': \((\d{1,15}),(?: (\d{1,15}))?\), \} *\n",
    re.DOTALL,
)


def write_array(path: Path, array: np.ndarray) -> None:
    """Replace a ``.npy`` file.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path, dimensions: int, check: Check | None = None) -> np.ndarray:
    """Read finite float64 numbers from a ``.npy`` file of one or two dimensions.

    The header must be the one that :func:`write_array` leaves: numpy's own reader evaluates it as
    an expression of Python, and allocates any amount of memory that it names.

    Raises:
        UserError: the file cannot be read, holds something else, or ``check`` refuses it.
    """
    with open_file(path) as file:
        data = file.read()
    header = ARRAY_HEADER.match(data)
    shape = [int(size) for size in header.groups() if size] if header else []
    values = data[header.end() :] if header else b""
    if len(shape) != dimensions or len(values) != 8 * math.prod(shape):
        raise UserError(
            f"{path} is damaged: it is no whole array of float64 of {dimensions} dimensions"
        )
    array = np.frombuffer(values, "<f8").reshape(shape).astype(np.float64)
    if not np.isfinite(array).all() or (array.size and np.abs(array).max() > LARGEST_LOSS):
        raise UserError(f"{path} is damaged: it has numbers that are not finite, or far too large")
    if check is not None:
        check(data)
    return array
