"""The command line: ``storylab VERB [FLAGS]``. Each verb is one file in ``verbs/``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from storylab import __version__
from storylab.cli.exits import guarded
from storylab.cli.registry import Call, family, find_verb, match_verb
from storylab.cli.usage import family_usage, usage

if TYPE_CHECKING:
    from storylab.execution.job import Executor


def main(argv: Sequence[str] | None = None, executor: Executor | None = None) -> int:
    """Run one verb; returns the exit code: 2 for bad input, 128 + n when signal n stopped it.

    Args:
        argv: verb and flags; by default the command line's.
        executor: carries out the jobs of experiments, calibrations and benches; by default in
            processes on this machine.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run_words(words, executor))


def run_verb(name: str, args: Sequence[str], prog: str) -> int:
    """Run the verb ``name`` for a program that help and messages call ``prog``; returns the exit code."""
    return guarded(lambda: _run_verb(name, prog, args, None))


def _run_verb(name: str, prog: str, args: Sequence[str], executor: Executor | None) -> int:
    return find_verb(name)(Call(prog, list(args), executor))


def _run_words(words: Sequence[str], executor: Executor | None) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"storylab {__version__}")
        return 0
    if words[1:2] in (["-h"], ["--help"]) and family(words[0]):
        print(family_usage(words[0]))
        return 0
    name, args = match_verb(words)
    return _run_verb(name, f"storylab {name}", args, executor)
