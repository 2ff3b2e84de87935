"""Flags to typed values, by tyro, with every mistake in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from storylab.config import TrainConfig, preset_config
from storylab.errors import UserError

T = TypeVar("T")


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
            return tyro.cli(
                kind,
                args=_switches(kind, args),
                prog=prog,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _one_line(errors.getvalue())
        raise UserError(f"{message}; {advice or f'see {prog} --help'}") from None


def _switches(kind: type[Any], args: Sequence[str]) -> list[str]:
    """Turn ``--compile=False`` and ``--compile False``, as nanoGPT has them, into ``--no_compile``."""
    names, rest, result = _switch_names(kind), deque(args), []
    while rest:
        arg = rest.popleft()
        flag, _, value = arg.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in names:
            if not value and rest and rest[0].lower() in ("true", "false"):
                value = rest.popleft()
            spelled = {"": f"--{name}", "true": f"--{name}", "false": f"--no_{name}"}
            arg = spelled.get(value.lower(), arg)
        result.append(arg)
    return result


def _switch_names(kind: type[Any]) -> set[str]:
    names: set[str] = set()
    for f in dataclasses.fields(kind):
        if f.type in ("bool", bool):
            names.add(f.name)
        elif f.name == "config":
            names |= _switch_names(TrainConfig)
    return names


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
    """The config that the flags start from: the one of --preset, so that help shows its values."""
    default = TrainConfig()
    for i, arg in enumerate(args):  # the last one counts, as it does for every flag
        flag, _, value = arg.partition("=")
        if flag == "--preset":
            default = preset_config(value or (args[i + 1] if i + 1 < len(args) else ""))
    return default
