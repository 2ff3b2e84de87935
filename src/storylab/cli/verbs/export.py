"""``storylab export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from storylab.cli.arguments import CheckpointName
from storylab.cli.registry import MORE_MEMORY, Call, Verb
from storylab.errors import UserError
from storylab.export import EXPORTERS

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(EXPORTERS)]


@dataclass(frozen=True)
class ExportCommand:
    """Write a run's model for other programs, or verify such a folder.

    The model must have a class that computes it exactly; others are refused with the reason. At the end
    the written model is checked against ours.

    Examples: storylab export runs/a --format hf --out exports/a | storylab export --verify exports/a
    """

    run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    """Run folder."""
    format: FormatName = "hf"
    """hf: a folder for transformers. gguf: a file for llama.cpp."""
    out: Path | None = None
    """Folder to write. An earlier, unchanged export in it is replaced; anything else is not touched."""
    weights: str | None = None
    """Type of the weights: f32 (hf); f16 or q8_0 (gguf, f16 by default)."""
    checkpoint: CheckpointName = "last"
    """The newest weights, or those with the best validation loss."""
    verify: Path | None = None
    """Check the export in this folder, in the program that it is for."""


def run(call: Call) -> int:
    """Export a model, or verify an export."""
    command = call.parse(ExportCommand)
    from storylab.cli.tables import print_lines

    if command.verify is not None:
        if command.run or command.out or command.weights:
            raise UserError("--verify takes a folder and nothing else: give it alone")
        from storylab.export.folder import verify_export

        for line in verify_export(command.verify):
            print_lines(line)
        return 0
    if command.run is None:
        raise UserError("name a run folder to export, or --verify FOLDER")
    if command.out is None:
        raise UserError("name the folder to write with --out")
    from storylab.export.folder import export_run

    record = export_run(
        command.run, command.format, command.weights, command.checkpoint, command.out
    )
    print_lines(f"{command.out}: {record.model_class}, weights in {record.weights}")
    for line in record.findings:
        print_lines(line)
    return 0


VERB = Verb(
    "export",
    "write a run's model for other programs",
    "runs",
    run,
    ExportCommand,
    position=7,
    memory_remedy=MORE_MEMORY,
)
