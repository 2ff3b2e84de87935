"""Verbs: each is a module in ``verbs/`` with a ``VERB``, found by its file name."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from storylab.cli import verbs
from storylab.errors import UserError, out_of_memory

if TYPE_CHECKING:
    from storylab.execution.job import Executor

T = TypeVar("T")
Group = Literal["runs", "experiments"]
GROUPS: tuple[Group, ...] = ("runs", "experiments")
SMALLER_STEPS = (
    "halve --batch_size and double --gradient_accumulation_steps, which trains on the same tokens, or "
    "take a smaller model"
)
# For verbs that train nothing, or only continue a run.
MORE_MEMORY = "end other programs, or go on on a machine with more memory"


@dataclass(frozen=True)
class Call:
    """One use of a verb.

    Attributes:
        prog: the program's name in help and messages, such as ``storylab train``.
        args: flags and operands.
        given: carries out jobs; None for processes on this machine.
    """

    prog: str
    args: list[str]
    given: Executor | None = None

    @property
    def executor(self) -> Executor:
        """Carries out jobs. Its modules are imported here, as most verbs have none."""
        if self.given is not None:
            return self.given
        from storylab.execution.local import LocalExecutor

        return LocalExecutor()

    def parse(self, kind: type[T], default: T | None = None) -> T:
        """The flags as a dataclass; see :func:`storylab.flags.parse`."""
        from storylab.flags import parse

        return parse(kind, self.args, self.prog, default)


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        name: one or two words; the file has the same name, with ``_`` for a space.
        help: one line for the list of verbs.
        group: the part of that list.
        run: does the work and returns the exit code.
        command: the dataclass whose fields are the verb's flags.
        operand: placeholder after the name in that list, such as ``FILE``.
        position: order within the group; ties are sorted by name.
        memory_remedy: advice for when memory runs out.
    """

    name: str
    help: str
    group: Group
    run: Callable[[Call], int]
    command: type[Any]
    operand: str = ""
    position: int = 99
    memory_remedy: str = SMALLER_STEPS

    def __call__(self, call: Call) -> int:
        """Do the work; returns the exit code.

        Raises:
            UserError: memory ran out, or the input cannot be used.
        """
        try:
            return self.run(call)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(f"out of memory: {self.memory_remedy}") from error


@dataclass(frozen=True)
class ListedVerb:
    """The facts about a verb that lists of verbs show; see :class:`Verb`."""

    name: str
    help: str
    group: Group
    operand: str = ""
    position: int = 99


def verb_names() -> list[str]:
    """Names of all verbs, from the names of their files; nothing is imported."""
    return [module.name.replace("_", " ") for module in pkgutil.iter_modules(verbs.__path__)]


def find_verb(name: str) -> Verb:
    """The verb ``name``; imports its module alone."""
    verb: Verb = import_module(f"{verbs.__name__}.{name.replace(' ', '_')}").VERB
    return verb


def all_verbs() -> list[Verb]:
    """All verbs, in the order of :func:`listed_verbs`."""
    return [find_verb(verb.name) for verb in listed_verbs()]


def listed_verbs() -> list[ListedVerb]:
    """The facts about all verbs, in the order of the list that users see.

    They are read from the source of each ``VERB``, as importing all verbs takes several times as long as
    everything else that the list needs.
    """
    found = (_listed(f"{name.replace(' ', '_')}.py") for name in verb_names())
    return sorted(found, key=lambda verb: (GROUPS.index(verb.group), verb.position, verb.name))


def _listed(file: str) -> ListedVerb:
    source = pkgutil.get_data(verbs.__name__, file)
    assert source is not None
    (call,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERB"
    )
    assert isinstance(call, ast.Call)
    given = dict(zip((field.name for field in fields(Verb)), call.args, strict=False))
    given |= {word.arg: word.value for word in call.keywords if word.arg is not None}
    wanted = (field.name for field in fields(ListedVerb) if field.name in given)
    return ListedVerb(**{name: ast.literal_eval(given[name]) for name in wanted})


def family(word: str) -> list[ListedVerb]:
    """The verbs of two words that begin with ``word``."""
    if not any(name.startswith(f"{word} ") for name in verb_names()):
        return []
    return [verb for verb in listed_verbs() if verb.name.startswith(f"{word} ")]


def match_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the verb that ``words`` begin with, and the words after it.

    Raises:
        UserError: they begin with no verb.
    """
    names = verb_names()
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in names:
            return name, list(words[count:])
    if seconds := [verb.name.partition(" ")[2] for verb in family(words[0])]:
        unknown = f"there is no '{words[1]}': " if words[1:] else ""
        raise UserError(f"{unknown}say what to do: storylab {words[0]} {', '.join(seconds)}")
    known = dict.fromkeys(verb.name.partition(" ")[0] for verb in listed_verbs())
    raise UserError(f"unknown verb '{words[0]}': use one of {', '.join(known)}")
