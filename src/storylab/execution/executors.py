"""The executors that a user can name; each is one module and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from storylab.errors import UserError

if TYPE_CHECKING:
    from storylab.execution.job import Executor

# Module and function, not imported before it is needed. An executor that needs a library has its own name
# as the extra that installs it.
EXECUTORS: Mapping[str, str] = {
    "local": "storylab.execution.local:executor",
    "ray": "storylab.execution.ray:executor",
    "slurm": "storylab.execution.slurm:executor",
}


@dataclass(frozen=True)
class ExecutorRequest:
    """An executor as a user asks for it.

    Attributes:
        jobs: how many jobs may run at the same time; None leaves it to the executor.
        options: options of the executor by name.
        runs: the folder of the run folders, which all machines see.
    """

    jobs: int | None
    options: Mapping[str, str]
    runs: Path

    def count(self, name: str, default: int) -> int:
        """The option ``name`` as a number of at least 1.

        Raises:
            UserError: it is something else.
        """
        text = self.options.get(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdecimal() and 0 < int(text) < 10**9):
            raise UserError(f"--executor_options {name}={text}: it must be a number of at least 1")
        return int(text)

    def require_known(self, executor: str, names: Sequence[str] = ()) -> None:
        """Raise a UserError for an option that is none of ``names``."""
        if unknown := sorted(set(self.options) - set(names)):
            known = f"use {', '.join(names)}" if names else "it has none"
            raise UserError(f"--executor {executor} has no option {', '.join(unknown)}: {known}")


def make_executor(name: str, jobs: int | None, options: Sequence[str], runs: Path) -> Executor:
    """The executor ``name``.

    Args:
        name: a key of :data:`EXECUTORS`.
        jobs: how many jobs may run at the same time; None leaves it to the executor.
        options: its options, each as ``KEY=VALUE``.
        runs: the folder of the run folders.

    Raises:
        UserError: an argument cannot be used, its library is not installed, or its cluster cannot be
            reached.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}: it must be at least 1")
    pairs = [option.partition("=") for option in options]
    if wrong := [key for key, equals, value in pairs if not (key and equals and value)]:
        raise UserError(f"--executor_options {wrong[0]}: write KEY=VALUE")
    module, _, function = EXECUTORS[name].partition(":")
    try:
        make: Callable[[ExecutorRequest], Executor] = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--executor {name} needs the package {error.name}: pip install 'storylab[{name}]'"
        ) from error
    return make(ExecutorRequest(jobs, {key: value for key, _, value in pairs}, runs))
