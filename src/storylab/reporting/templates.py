"""Templates of plain text: EXPERIMENTS.md and the card of an exported model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jinja2


def text_template(
    package: str, name: str, filters: Mapping[str, Callable[..., Any]]
) -> jinja2.Template:
    """A template in a package. A value that it names and does not get is an error; nothing is escaped but
    by its filters."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= filters
    return environment.get_template(name)
