"""``storylab completion``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal

import tyro

from storylab.cli.registry import Call, Verb
from storylab.errors import UserError

Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True)
class CompletionCommand:
    """Print a script that completes verbs, flags and their choices in a shell.

    The script names them as this version has them, so the shell starts no Python to complete a word.
    docs/guide/command-line.md says where each shell looks for it.

    Examples: storylab completion bash > ~/.local/share/bash-completion/completions/storylab
    """

    shell: Annotated[Shell, tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")]
    """bash, zsh or fish."""


def run(call: Call) -> int:
    """Print the script."""
    command = call.parse(CompletionCommand)
    if not find_spec("shtab"):
        raise UserError("completion needs one more package: pip install 'storylab[completion]'")
    import shtab

    from storylab.cli.parsers import whole_parser

    print(shtab.complete(whole_parser(), command.shell))
    return 0


VERB = Verb(
    "completion",
    "print a script that completes this command line in a shell",
    "runs",
    run,
    CompletionCommand,
    operand="SHELL",
    position=8,
)
