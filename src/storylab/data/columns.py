"""Find the column of a Parquet file that holds the stories."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from storylab.errors import UserError
from storylab.files import shown

# Columns of text as parquet has them. Bytes are text for writers that leave the annotation out.
_TEXT_TYPES = {
    *("string", "large_string", "string_view"),
    *("binary", "large_binary", "binary_view", "null"),
}


def text_column(path: Path, schema: pa.Schema) -> str:
    """Name of the column with the stories.

    Raises:
        UserError: there is none, or it holds something else than text.
    """
    name = next((name for name in ("text", "story") if name in schema.names), None)
    if name is None:
        columns = shown(", ".join(schema.names))
        raise UserError(f"{shown(path)} has no column 'text' or 'story' (its columns: {columns})")
    if schema.names.count(name) > 1:
        raise UserError(f"{shown(path)} has two columns '{name}': rename or remove one")
    kind = schema.field(name).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(plain) not in _TEXT_TYPES:
        raise UserError(f"{shown(path)}: the column '{name}' holds {shown(str(kind))}, not text")
    return name
