"""``storylab import``."""
# ruff: noqa: N999 - a verb's file has the name of the verb, here a keyword

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from storylab.cli.registry import MORE_MEMORY, Call, Verb


@dataclass(frozen=True)
class ImportCommand:
    """Copy a model of another program into a folder that eval, sample and compare read.

    The source is a folder of transformers (Llama, Mistral, Cwm or Qwen3 with safetensors and
    tokenizer.json) or a .bin checkpoint of llama2.c with its tokenizer.bin. A model that cannot be computed
    exactly is refused with the reason. No code of the source runs, and nothing is unpickled.

    Examples: storylab import exports/first --out_dir models/first
    | storylab import stories15M.bin --out_dir models/stories15M --tokenizer tokenizer.bin
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder or .bin file."""
    out_dir: Path
    """Folder to write; it must be missing or empty."""
    tokenizer: Path | None = None
    """The tokenizer's file, if it is not next to the weights."""
    begin_id: int | None = None
    """Id before a story; by default the one that the tokenizer puts before a text."""
    end_id: int | None = None
    """Id after a story; by default that of config.json, and for llama2.c the one that begins the next."""


def run(call: Call) -> int:
    """Import a model."""
    command = call.parse(ImportCommand)
    from storylab.imported.folder import import_model

    record = import_model(
        command.source, command.out_dir, command.tokenizer, command.begin_id, command.end_id
    )
    shape = record.shape
    print(f"{command.out_dir}: {record.architecture}, {record.parameters:,} parameters")
    print(f"{shape.vocab_size:,} token ids by {record.tokenizer}, up to {shape.context:,} at once")
    print(f"a story begins with id {record.begin_of_text} and ends with id {record.end_of_text}")
    return 0


VERB = Verb(
    "import",
    "copy a model of another program, to evaluate and compare it",
    "runs",
    run,
    ImportCommand,
    operand="SOURCE",
    position=8,
    memory_remedy=MORE_MEMORY,
)
