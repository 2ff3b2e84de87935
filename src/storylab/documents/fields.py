"""Types of the fields of a document. Every field has a meaning, and a unit where it is a quantity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec


def about(meaning: str, unit: str = "") -> msgspec.Meta:
    """Mark a field with its meaning, and with its unit if it is a quantity.

    Args:
        meaning: becomes the field's ``description`` in a JSON Schema; says when the field is null.
        unit: as in the name of the field, such as ``seconds``; empty for a field without a unit.
    """
    return msgspec.Meta(description=meaning, extra={"unit": unit})


@dataclass(frozen=True)
class FieldInfo:
    """A field of a document, or of an object in it.

    Attributes:
        path: of the field, such as ``runs[].tokens``.
        type: JSON's name of its type, such as ``integer or null``.
        unit: of its number; empty for none.
        meaning: one or two sentences.
    """

    path: str
    type: str
    unit: str
    meaning: str


# JSON's name of each type that fields have.
_NAMES: dict[type[Any], str] = {
    msgspec.inspect.StrType: "text",
    msgspec.inspect.IntType: "integer",
    msgspec.inspect.FloatType: "number",
    msgspec.inspect.BoolType: "true or false",
    msgspec.inspect.NoneType: "null",
}


def describe(document: type[msgspec.Struct]) -> list[FieldInfo]:
    """All fields of a document, in their order; the fields of an object follow the one that holds it.

    Raises:
        TypeError: a field has no meaning, or a type that no document may have.
    """
    info = msgspec.inspect.type_info(document)
    assert isinstance(info, msgspec.inspect.StructType)
    schema = FieldInfo("schema", "text", "", f"`{info.tag}`")
    return [schema, *_fields(info, "")]


def _fields(struct: msgspec.inspect.StructType, prefix: str) -> Iterator[FieldInfo]:
    for field in struct.fields:
        path = prefix + field.encode_name
        if not isinstance(field.type, msgspec.inspect.Metadata):
            raise TypeError(f"{struct.cls.__name__}.{field.name} has no meaning: use about(...)")
        marks = (field.type.extra_json_schema or {}) | (field.type.extra or {})
        kind = field.type.type
        yield FieldInfo(path, _type_name(kind), marks["unit"], marks["description"])
        inner, brackets = _inner(kind)
        if inner is not None:
            yield from _fields(inner, f"{path}{brackets}.")


def _inner(kind: msgspec.inspect.Type) -> tuple[msgspec.inspect.StructType | None, str]:
    """The struct that a field holds, if it does, and ``[]`` if it holds a list of them."""
    match kind:
        case msgspec.inspect.StructType():
            return kind, ""
        case msgspec.inspect.UnionType():
            found = (_inner(part) for part in kind.types)
            return next((pair for pair in found if pair[0] is not None), (None, ""))
        case msgspec.inspect.ListType():
            return _inner(kind.item_type)[0], "[]"
    return None, ""


def _type_name(kind: msgspec.inspect.Type) -> str:
    match kind:
        case msgspec.inspect.StructType():
            return "object"
        case msgspec.inspect.UnionType():
            return " or ".join(map(_type_name, kind.types))
        case msgspec.inspect.ListType():
            return f"list of {_part_name(kind.item_type)}"
        case msgspec.inspect.DictType():
            return f"object of {_part_name(kind.value_type)}"
    if type(kind) not in _NAMES:
        raise TypeError(f"no document may hold a {kind}")
    return _NAMES[type(kind)]


def _part_name(kind: msgspec.inspect.Type) -> str:
    name = _type_name(kind)
    return f"({name})" if isinstance(kind, msgspec.inspect.UnionType) else name
