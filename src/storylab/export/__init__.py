"""Models in the formats of other programs.

A format is one module with an ``EXPORTER``, and one entry in :data:`EXPORTERS`. This package does not load
torch; the modules of the formats do.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storylab.export.exporter import Exporter

# Name of a format, and the module of this package that writes it.
EXPORTERS: Mapping[str, str] = {"hf": "hf", "gguf": "gguf"}


def find_exporter(name: str) -> Exporter:
    """The exporter of a format; imports its module alone."""
    exporter: Exporter = import_module(f"{__name__}.{EXPORTERS[name]}").EXPORTER
    return exporter
