"""Print one JSON document, for verbs with --json."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from storylab.documents import Document


def print_document(make: Callable[[], Document]) -> None:
    """Print the document that ``make`` returns; other output of ``make`` goes to standard error."""
    with remarks_on_stderr():
        document = make()
    print(as_json(document))


@contextlib.contextmanager
def remarks_on_stderr(asked: bool = True) -> Iterator[None]:
    """Send other output than the document to standard error, if ``asked``."""
    with contextlib.redirect_stdout(sys.stderr) if asked else contextlib.nullcontext():
        yield


def as_json(document: Document) -> str:
    """A document as strict JSON in ASCII. A number that is not finite becomes null.

    A name of a file that is not Unicode has question marks for its other bytes.
    """
    return json.dumps(_strict(msgspec.to_builtins(document)), allow_nan=False, indent=2)


def _strict(value: Any) -> Any:
    match value:
        case dict():
            return {_strict(key): _strict(item) for key, item in value.items()}
        case list():
            return [_strict(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case str():
            return value.encode("utf-8", "replace").decode()
    return value
