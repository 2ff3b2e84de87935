"""Decode JSON into typed values, strictly; every error names the file, the key and the fault.

Types are msgspec structs, dataclasses, and the types of their fields. Unknown keys are ignored, so
that a file of a later version can be read.
"""

from __future__ import annotations

import json
import re
import reprlib
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from storylab.errors import UserError

T = TypeVar("T")
LARGEST_INT = 2**63 - 1
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 40
# A message of msgspec: "Expected `int`, got `str` - at `$.cells[2].seed`".
_PLACED = re.compile(r"(.*?)(?: - at `(?:key in )?\$\.?(.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")


def decode(kind: type[T], data: bytes, place: str) -> T:
    """Decode JSON text into a value of type ``kind``.

    A name of a file that is not Unicode, which JSON holds as a lone surrogate, is read with question marks.

    Raises:
        UserError: the text is not JSON, or a value in it is missing, of another type or out of its range;
            the message begins with ``place``.
    """
    try:
        return _decoder(kind).decode(data)  # type: ignore[arg-type]
    except msgspec.ValidationError as error:
        raise UserError(f"{place} is damaged: {fault(error)}") from error
    except (ValueError, RecursionError) as error:
        if b"\\ud" in data.lower() and (mended := _without_surrogates(data)) is not None:
            return decode(kind, mended, place)
        raise UserError(
            f"{place} is not valid JSON ({_words(error)}): it has been altered"
        ) from error


def convert(kind: type[T], value: object, place: str) -> T:
    """Make a value of type ``kind`` from parsed JSON.

    Raises:
        UserError: a part of it is missing, of another type or out of its range; the message begins with
            ``place``.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_path)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(f"{place} is damaged: {fault(error)}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{place} is damaged: it has half of a surrogate pair") from error


def fault(error: Exception) -> str:
    """A message of msgspec with the key first: ``samples[1].text: is missing``."""
    found = _PLACED.fullmatch(_words(error))
    assert found is not None
    what, path = found[1], found[2] or ""
    if missing := _MISSING.fullmatch(what):
        return f"{path}{'.' * bool(path)}{missing[1]}: is missing"
    # The message of one of our checks is a sentence that has the name in it.
    what = what[:1].lower() + what[1:]
    return f"{path}: {what}" if path else what


def _words(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"expected text, got {shown(value)}")


def _without_surrogates(data: bytes) -> bytes | None:
    """``data`` with ``?`` for every lone surrogate; None if it has none, or is not JSON."""
    try:
        text = json.dumps(json.loads(data), ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
    return None if is_unicode(text) else text.encode("utf-8", "replace")


def shown(value: object) -> str:
    """``value`` for a message: on one line, shortened."""
    return _REPR.repr(value)


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8; Python's form of a file's name of other bytes cannot."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
