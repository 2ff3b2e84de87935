"""Models that other programs trained, to evaluate, sample and compare with our own.

An import copies weights and tokenizer into a model folder, with a record of where they come from. It is
not a run: nobody here trained it, and nothing trains it on.

A kind of source is one module with a ``read`` and one entry in :data:`READERS`. Nothing here runs code of a
source, and no file is unpickled. This package does not load torch; its modules do.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from storylab.files import exists

if TYPE_CHECKING:
    from storylab.imported.source import ReadSource

RECORD = "storylab_model.json"
# The kinds of sources: name, and the module of this package that reads it.
READERS: Mapping[str, str] = {"hf": "hf", "llama2c": "llama2c"}


def find_reader(name: str) -> ReadSource:
    """The function that reads sources of a kind; imports its module alone."""
    read: ReadSource = import_module(f"{__name__}.{READERS[name]}").read
    return read


def is_imported(folder: Path) -> bool:
    """Whether ``folder`` holds an imported model.

    Raises:
        UserError: the system refuses to say.
    """
    return exists(folder / RECORD)
