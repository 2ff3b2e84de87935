"""``storylab experiment new``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from storylab.cli.arguments import ExperimentFile
from storylab.cli.registry import Call, Verb
from storylab.errors import UserError


@dataclass(frozen=True)
class ExperimentNewCommand:
    """Write the skeleton of an experiment file, which runs without an edit.

    Examples: storylab experiment new mine.toml | storylab experiment new mine.toml --title "Decay"
    """

    file: ExperimentFile
    """File to write."""
    title: str = "My experiment"
    """Its title."""


def run(call: Call) -> int:
    """Write the skeleton of an experiment file."""
    command = call.parse(ExperimentNewCommand)
    from storylab.experiments.skeleton import skeleton
    from storylab.files import exists, write_text

    if exists(command.file):
        raise UserError(f"{command.file} exists already: choose another name")
    write_text(command.file, skeleton(command.title))
    print(
        f"{command.file}: change it, then: storylab experiment run {shlex.quote(str(command.file))}"
    )
    return 0


VERB = Verb(
    "experiment new",
    "write the skeleton of an experiment file",
    "experiments",
    run,
    ExperimentNewCommand,
    operand="FILE",
    position=2,
)
