"""``storylab publish``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from storylab.cli.registry import MORE_MEMORY, Call, Verb


@dataclass(frozen=True)
class PublishCommand:
    """Upload an export to the Hugging Face hub: its own files and nothing else, after comparing them with
    their hashes. The token is that of `hf auth login`, or HF_TOKEN.

    Examples: storylab publish exports/first --repo me/first-stories --dry_run
    | storylab publish exports/first --repo me/first-stories --public
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of an export."""
    repo: str
    """Model on the hub, owner/name. It is made if it does not exist."""
    public: bool = False
    """Let everybody see it; by default a new model is private."""
    dry_run: bool = False
    """List the files and their sizes, and stop; nothing is contacted."""


def run(call: Call) -> int:
    """Publish an export."""
    command = call.parse(PublishCommand)
    from storylab.export.publish import export_files, publish, require_repository

    if not command.dry_run:
        print(publish(command.folder, command.repo, command.public))
        return 0
    require_repository(command.repo)
    files = export_files(command.folder)
    for name, size in files.items():
        print(f"{size:>15,} bytes  {name}")
    visibility = "public" if command.public else "private"
    print(f"{sum(files.values()):>15,} bytes to {command.repo}, {visibility} if it is new")
    return 0


VERB = Verb(
    "publish",
    "upload an export to the Hugging Face hub",
    "runs",
    run,
    PublishCommand,
    operand="FOLDER",
    position=8,
    memory_remedy=MORE_MEMORY,
)
