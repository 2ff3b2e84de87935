"""Flags to typed values, by tyro, with every mistake in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from storylab.config import DEFAULT_PRESET, ModelConfig, TrainConfig, preset_config
from storylab.errors import UserError

T = TypeVar("T")

# An empty argument as a path: no file has this name, while that of Path("") is the current folder.
EMPTY_PATH = Path("\0")


def parse(
    kind: type[T],
    args: Sequence[str],
    prog: str,
    default: T | None = None,
    advice: str | None = None,
) -> T:
    """Build ``kind`` from flags; ``--max_iters`` and ``--max-iters`` are the same flag.

    Raises:
        UserError: a flag or value is wrong; the text of the parser's message in one line.
        SystemExit: ``--help`` was printed.
    """
    errors = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(errors):
            command = tyro.cli(
                kind,
                args=_switches(kind, args),
                prog=prog,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_registry(),
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _one_line(errors.getvalue())
        raise UserError(f"{message}; {advice or f'see {prog} --help'}") from None
    for name in _empty_paths(command):
        flag = f"--{name}" if name in given_flags(args) else name.upper()
        raise UserError(f"{flag} has an empty path: give one (a variable that is not set is empty)")
    return command


def _registry() -> ConstructorRegistry:
    """The parser's types, with an empty path kept apart from the current folder."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda args: Path(args[0]) if args[0] else EMPTY_PATH,
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _empty_paths(command: Any) -> Iterator[str]:
    """Names of the fields that hold an empty path."""
    for f in dataclasses.fields(command):
        value = getattr(command, f.name)
        if dataclasses.is_dataclass(value):
            yield from _empty_paths(value)
        elif value == EMPTY_PATH or (isinstance(value, tuple) and EMPTY_PATH in value):
            yield f.name


def _switches(kind: type[Any], args: Sequence[str]) -> list[str]:
    """Spell ``--flag``, ``--no_flag``, ``--flag=False`` and ``--flag False``, as nanoGPT has them, in
    the way that the parser takes: a value for a switch that may be left open, else ``--no_flag``."""
    names, rest, result = _switch_names(kind), deque(args), []
    while rest:
        arg = rest.popleft()
        flag, _, value = arg.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        negated = name.startswith("no_") and not value
        name = name.removeprefix("no_") if negated else name
        if not flag.startswith("--") or name not in names:
            result.append(arg)
            continue
        if not value and not negated and rest and rest[0].lower() in ("true", "false"):
            value = rest.popleft()
        spelled = {"": not negated, "true": True, "false": False}.get(value.lower())
        if spelled is None:
            result.append(arg)
        elif names[name]:
            result += [f"--{name}", str(spelled)]
        else:
            result.append(f"--{name}" if spelled else f"--no_{name}")
    return result


def _switch_names(kind: type[Any]) -> dict[str, bool]:
    """Names of the fields that are switches, and whether they may be left open (None)."""
    names: dict[str, bool] = {}
    for f in dataclasses.fields(kind):
        if f.type in ("bool", bool, "bool | None"):
            names[f.name] = f.type == "bool | None"
        elif f.name in ("config", "model"):
            names |= _switch_names(TrainConfig if f.name == "config" else ModelConfig)
    return names


def given_flags(args: Sequence[str]) -> list[str]:
    """Names of the flags in ``args``, in order, as fields have them: batch_size for --batch-size=4, and
    compile for --no_compile."""
    flags = (arg.partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--"))
    return list(dict.fromkeys(flag.removeprefix("__").removeprefix("no_") for flag in flags))


def vocab_size_or(given: int, default: int) -> int:
    """The value of --vocab_size, or ``default`` where it is 0.

    Raises:
        UserError: it is negative.
    """
    if given < 0:
        raise UserError(f"vocab_size is {given}: it must be at least 1, or 0 for {default:,}")
    return given or default


def _one_line(box: str) -> str:
    """The message of the parser's box, with its suggestion if it has one."""
    sections: list[list[str]] = [[]]
    # The first line is the box's title, which says less than what is in it.
    for row in (line.strip("│|╰╯+ ") for line in box.strip().splitlines()[1:]):
        if row and set(row) <= set("─-"):
            sections.append([])
        elif row:
            sections[-1].append(row)
    texts = [" ".join(section) for section in sections if section]
    message = re.sub(r"^Error parsing config[\w.]*: ", "", texts[0]) if texts else ""
    for text in texts[1:]:
        if text.startswith("Perhaps you meant"):
            flags = [word.rstrip(",") for word in text.split() if word.startswith("--")]
            message += f"; perhaps you meant {' or '.join(dict.fromkeys(flags))}"
    return message.rstrip(".") or "the flags cannot be read"


def default_for(args: Sequence[str]) -> TrainConfig:
    """The config of --preset and --method, which the other flags start from, so help shows its values."""
    chosen: dict[str, str] = {}
    for i, arg in enumerate(args):  # the last one counts, as it does for every flag
        flag, _, value = arg.partition("=")
        if flag in ("--preset", "--method"):
            chosen[flag] = value or (args[i + 1] if i + 1 < len(args) else "")
    return preset_config(chosen.get("--preset", DEFAULT_PRESET), chosen.get("--method", "record"))
