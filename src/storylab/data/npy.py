"""``.npy`` files of one fixed form, read without numpy's reader.

That one evaluates the header as a literal of Python, and allocates any amount of memory that it names.
"""

from __future__ import annotations

import math
import re

import numpy as np

_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<[fi]8)', 'fortran_order': False, "
    rb"'shape': \((\d{1,15}),(?: (\d{1,15}))?\), \} *\n",
    re.DOTALL,
)


def parse_npy(data: bytes, descr: str, dimensions: int) -> np.ndarray | None:
    """The array in the bytes of a ``.npy`` file, not writable; None if it is not whole or of another form.

    Args:
        data: the file, as ``numpy.save`` writes it.
        descr: type of the elements, ``<f8`` or ``<i8``.
        dimensions: 1 or 2.
    """
    header = _HEADER.match(data)
    if header is None or header[1] != descr.encode():
        return None
    shape = [int(size) for size in header.groups()[1:] if size]
    values = data[header.end() :]
    if len(shape) != dimensions or len(values) != 8 * math.prod(shape):
        return None
    return np.frombuffer(values, descr).reshape(shape)
