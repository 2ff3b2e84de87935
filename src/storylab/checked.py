"""Holds values that were read from a file against the types that they must have.

A fault is named with its path, such as ``cells[2].runs``, so that whoever finds a damaged file can mend it.
"""

from __future__ import annotations

import dataclasses
import reprlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from storylab.errors import UserError

T = TypeVar("T")
Fault = tuple[str, str]
"""Path of what does not fit, and what is wrong with it."""
Check = Callable[[Any], Fault | None]

# What a value of any kind may be nested to; JSON itself has no bound, and Python's stack has.
DEPTH = 20
LARGEST_INT = 2**63 - 1
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 40


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included unless it must be ``above`` the lower one."""

    low: float
    high: float
    above: bool = False


def check(kind: type[T], value: object, place: str) -> T:
    """Return ``value``, which is of type ``kind`` for certain then.

    Types are those that JSON can hold: TypedDicts (keys that they do not name may be there), lists,
    dicts, Literals, optional values, numbers (finite ones) with a :class:`Range`, text. Of a dataclass
    the fields that are there are checked.

    Raises:
        UserError: something does not fit; ``place`` begins the message.
    """
    fault = _check(cast(Any, kind))(value)
    if fault is not None:
        path, what = fault
        raise UserError(f"{place} is damaged: {path + ' ' if path else 'it '}{what}")
    return cast(T, value)


def shown(value: object) -> str:
    """``value`` in a message: in one line, shortened."""
    return _REPR.repr(value)


@cache
def _check(kind: Any) -> Check:
    """The check of a type, made once."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _within(arguments[0], arguments[1])
    if origin is Literal:
        return _one_of(arguments)
    if origin in (Union, UnionType):
        (other,) = (argument for argument in arguments if argument is not type(None))
        return _or_none(_check(other))
    if origin is list:
        return _list(_check(arguments[0]))
    if origin is dict:
        return _dict(_check(arguments[1]))
    if is_typeddict(kind):
        return _table(dict(_fields(kind)))
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return _table({name: (_check(hint), False) for name, hint in hints.items()})
    return _PLAIN[kind]


def _fields(kind: Any) -> Iterator[tuple[str, tuple[Check, bool]]]:
    """Keys of a TypedDict with the check of each, and whether it must be there."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        optional = get_origin(hint) is NotRequired
        yield name, (_check(get_args(hint)[0] if optional else hint), not optional)


def _bool(value: Any) -> Fault | None:
    return None if type(value) is bool else ("", f"is {shown(value)}, not true or false")


def _int(value: Any) -> Fault | None:
    if type(value) is not int:
        return "", f"is {shown(value)}, not a whole number"
    return None if abs(value) <= LARGEST_INT else ("", f"is {shown(value)}, which is too large")


def _float(value: Any) -> Fault | None:
    if type(value) is not float and type(value) is not int:
        return "", f"is {shown(value)}, not a number"
    # Neither NaN nor infinite, nor a whole number that no float can hold.
    return None if abs(value) <= sys.float_info.max else ("", f"is {shown(value)}, not finite")


def _text(value: Any) -> Fault | None:
    if type(value) is not str:
        return "", f"is {shown(value)}, not text"
    return None if is_unicode(value) else ("", f"is {shown(value)}, which is no Unicode text")


def _name(value: Any) -> Fault | None:
    """Of a file: bytes that are no Unicode may be in it."""
    return None if type(value) is str else ("", f"is {shown(value)}, not text")


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: bytes of a file's name that are none make text that
    cannot."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _any(value: Any, depth: int = DEPTH) -> Fault | None:
    """Whatever JSON holds, but not nested without end."""
    if depth == 0:
        return "", "is nested too deep"
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next((fault for entry in value if (fault := _any(entry, depth - 1))), None)
    return None


_PLAIN: dict[Any, Check] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _text,
    Path: _name,
    object: _any,
    Any: _any,
}


def _within(kind: type, bounds: Range) -> Check:
    inner, kinds = _check(kind), (int,) if kind is int else (float, int)

    def run(value: Any) -> Fault | None:
        # Nearly always so, and there may be a million of them.
        if type(value) in kinds and bounds.low < value <= bounds.high:
            return None
        if fault := inner(value):
            return fault
        if value < bounds.low or (bounds.above and value == bounds.low):
            return (
                "",
                f"is {shown(value)}, not {'above' if bounds.above else 'at least'} {bounds.low:g}",
            )
        return None if value <= bounds.high else ("", f"is {shown(value)}, which is too large")

    return run


def _one_of(choices: tuple[Any, ...]) -> Check:
    def run(value: Any) -> Fault | None:
        if isinstance(value, str) and value in choices:
            return None
        return "", f"is {shown(value)}, not one of {', '.join(choices)}"

    return run


def _or_none(inner: Check) -> Check:
    return lambda value: None if value is None else inner(value)


def _list(inner: Check) -> Check:
    def run(value: Any) -> Fault | None:
        if type(value) is not list:
            return "", f"is {shown(value)}, not a list"
        for i, entry in enumerate(value):
            if fault := inner(entry):
                return _path(f"[{i}]", fault)
        return None

    return run


def _dict(inner: Check) -> Check:
    def run(value: Any) -> Fault | None:
        if type(value) is not dict:
            return "", f"is {shown(value)}, not a table"
        for name, entry in value.items():
            if fault := _text(name) or inner(entry):
                return _path(name, fault)
        return None

    return run


def _table(fields: dict[str, tuple[Check, bool]]) -> Check:
    def run(value: Any) -> Fault | None:
        if type(value) is not dict:
            return "", f"is {shown(value)}, not a table"
        for name, (inner, required) in fields.items():
            if name in value:
                if fault := inner(value[name]):
                    return _path(name, fault)
            elif required:
                return name, "is missing"
        return None

    return run


def _path(name: str, fault: Fault) -> Fault:
    """The fault of a part, with the part's name before its path."""
    inner, what = fault
    return f"{name}{'' if not inner or inner.startswith('[') else '.'}{inner}", what
