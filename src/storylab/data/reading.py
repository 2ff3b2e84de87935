"""Texts in files (.txt, .jsonl and .parquet, plain or compressed), checked on the way.

Every fault in a file's content becomes one line that names the file and the place in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storylab.data.columns import text_column
from storylab.data.layout import END_OF_TEXT
from storylab.data.separators import other_separator
from storylab.data.tally import Tally
from storylab.errors import UserError
from storylab.files import open_file, reading, shown

READ_BYTES = 1 << 20
MAX_STORY_BYTES = 64_000_000
PARQUET_ROWS = 4096
BYTE_ORDER_MARK = "\ufeff"

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
# First bytes of files that are not text in UTF-8. UTF-32's marks begin with UTF-16's.
_BEGINNINGS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ\0": "compressed by xz",
    b"BZh": "compressed by bzip2",
    b"PK\x03\x04": "a zip file",
    b"PAR1": "a parquet file",
    b"%PDF-": "a PDF file",
}


def kind_of(path: Path) -> str | None:
    """Which reader a file needs by its name: txt, jsonl or parquet; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSION:
        suffixes.pop()
    kind = suffixes[-1].removeprefix(".") if suffixes else ""
    return kind if kind in ("txt", "jsonl", "parquet") else None


def text_bytes(path: Path) -> int:
    """Size of the text in a file: exact for .txt, from the metadata for parquet, else a guess."""
    if kind_of(path) == "parquet":
        with open_file(path) as stream, _checked(path):
            metadata = pq.ParquetFile(stream).metadata
            return sum(
                metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)
            )
    with reading(path):
        return path.stat().st_size * (3 if path.suffix.lower() in _COMPRESSION else 1)


def read_texts(path: Path, tally: Tally) -> Iterator[str | None]:
    """Texts of one file in order, None for a null row, a bounded part of it in memory at a time.

    Raises:
        UserError: the file cannot be read, is damaged, has no text column or is not UTF-8.
    """
    readers = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_parquet}
    yield from readers[kind_of(path) or "txt"](path, tally)


def clean(texts: Iterator[str | None], tally: Tally) -> Iterator[str]:
    """Stories: texts with LF line ends, no byte order mark and no space around; empty ones dropped."""
    for text in texts:
        if text is None:
            tally.null_rows += 1
            continue
        if "\r" in text:
            tally.line_ends += text.count("\r")
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if BYTE_ORDER_MARK in text:
            tally.byte_order_marks += text.count(BYTE_ORDER_MARK)
            text = text.replace(BYTE_ORDER_MARK, "")
        story = text.strip()
        if not story:
            tally.blank_rows += 1
            continue
        tally.markers += END_OF_TEXT in story
        yield story


@contextmanager
def _checked(path: Path) -> Iterator[None]:
    """Turn the readers' errors about a file's content into a line that names the file."""
    with reading(path):
        try:
            yield
        except UserError:
            raise
        except (OSError, pa.ArrowException, ValueError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # the file system's
            reason = shown((str(error).splitlines() or [type(error).__name__])[0])
            raise UserError(
                f"cannot read {shown(path)} ({reason}): it is damaged, or not of the "
                "kind that its name says; get the file again"
            ) from error


def _pieces(path: Path, mark: bytes) -> Iterator[tuple[int, bytes]]:
    """Pieces between marks, read in blocks, each with the offset of its first byte in the text."""
    buffer, offset, searched = bytearray(), 0, 0
    compression = _COMPRESSION.get(path.suffix.lower())
    with (
        open_file(path) as file,
        _checked(path),
        pa.input_stream(file, compression=compression) as stream,
    ):
        # Not read(), which keeps the memory of a block that turns out to be damaged.
        while block := stream.read_buffer(READ_BYTES).to_pybytes():
            if not offset and not buffer:
                _check_beginning(path, block)
            buffer += block
            begin = 0
            while (end := buffer.find(mark, max(begin, searched))) >= 0:
                yield offset + begin, bytes(buffer[begin:end])
                begin = searched = end + len(mark)
            del buffer[:begin]
            offset += begin
            # A mark may span two blocks; bytes that were searched are not searched again.
            searched = max(0, len(buffer) - len(mark) + 1)
            if len(buffer) > MAX_STORY_BYTES:
                raise _too_long(path, mark, buffer)
    yield offset, bytes(buffer)


def _check_beginning(path: Path, block: bytes) -> None:
    for beginning, what in _BEGINNINGS.items():
        if block.startswith(beginning):
            raise UserError(f"{shown(path)} is {what} by its first bytes: save it as UTF-8 text")


def _too_long(path: Path, mark: bytes, buffer: bytearray) -> UserError:
    size = f"{MAX_STORY_BYTES // 10**6} MB"
    if b"\0" in buffer:
        return UserError(f"{shown(path)} {_NUL}")
    has = other_separator(buffer.decode(errors="replace"))
    return UserError(
        f"{shown(path)} has over {size} without {mark.decode()!r} (it has {has}): put one between stories"
    )


_NUL = f"has NUL bytes: is it UTF-16? save it as UTF-8, with {END_OF_TEXT} between stories"


def _decode(data: bytes, path: Path, place: str, offset: int | None = None) -> str:
    """The text of ``data``, which begins at byte ``offset`` of the file's text.

    Raises:
        UserError: it is not UTF-8, or has a NUL.
    """

    def where(index: int) -> str:
        if offset is None:
            return f"{shown(path)}, {place}"
        uncompressed = " uncompressed" if path.suffix.lower() in _COMPRESSION else ""
        return f"{shown(path)}, byte {offset + index:,}{uncompressed} ({place})"

    if b"\0" in data:
        raise UserError(f"{where(data.index(0))}: {_NUL}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where(error.start)}: not UTF-8 (0x{data[error.start]:02x}); save it as UTF-8"
        ) from error


def _read_txt(path: Path, tally: Tally) -> Iterator[str]:
    number, first = 0, ""
    for offset, piece in _pieces(path, END_OF_TEXT.encode()):
        text = _decode(piece, path, f"story {number + 1:,}", offset)
        if text.replace(BYTE_ORDER_MARK, "").strip():
            number += 1
            first = first or text
            yield text
    if number == 1:
        tally.note_unseparated(path.name, other_separator(first))


def _read_jsonl(path: Path, tally: Tally) -> Iterator[str | None]:
    number = 0
    for offset, piece in _pieces(path, b"\n"):
        line = _decode(piece, path, f"line {number + 1:,}", offset)
        for row in line.rstrip("\r").split("\r"):  # a CR in a string would be escaped
            number += 1
            content = row.strip()
            if content.startswith(BYTE_ORDER_MARK):
                tally.byte_order_marks += 1
                content = content.lstrip(BYTE_ORDER_MARK + " ")
            if content:
                yield _text_of(content, f"{shown(path)} line {number:,}")


def _text_of(row: str, place: str) -> str | None:
    """The text of a row of JSON, None where it is null."""
    try:
        value = _DECODER.decode(row)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place} is not JSON: {error.msg} (column {error.colno:,}): each line must be a row"
        ) from error
    except RecursionError as error:
        raise UserError(f"{place} is nested too deeply: give rows of text") from error
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    text = value.get("text", value.get("story")) if isinstance(value, dict) else value
    if isinstance(value, dict) and not value.keys() & {"text", "story"}:
        raise UserError(f'{place} has no "text" (or "story")')
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(f'{place}: its "text" (or "story") is no string')
    if "\0" in text:
        raise UserError(f"{place} {_NUL}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place} has half of a surrogate pair ({text[error.start]!a}), which is no "
            "character: correct the row or leave it out"
        ) from error
    return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        for name in ("text", "story"):
            if names.count(name) > 1:
                raise ValueError(f'it has "{name}" twice: keep one')
    return row


# Whole numbers as floats: Python refuses to read one of more than 4,300 digits as an integer.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_int=float)


def _read_parquet(path: Path, tally: Tally) -> Iterator[str | None]:
    with open_file(path) as stream, _checked(path):
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        name = text_column(path, file.schema_arrow)
        number = 0
        batches = file.iter_batches(PARQUET_ROWS, columns=[name], use_threads=False)
        while (batch := _next_batch(batches, path, number)) is not None:
            # Rows are counted by their place in the file, so an empty one is kept until cleaning.
            for value in batch.column(name):
                number += 1
                yield _text_of_value(value, path, f"row {number:,}")


def _next_batch(batches: Iterator[pa.RecordBatch], path: Path, rows: int) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        # Words of a dictionary are checked all at once, so which row has them is not known.
        raise UserError(
            f"{shown(path)}, after row {rows:,}: not UTF-8; save it as UTF-8"
        ) from error


def _text_of_value(value: pa.Scalar, path: Path, place: str) -> str | None:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)}, {place}: not UTF-8; save it as UTF-8") from error
    if isinstance(text, bytes):
        return _decode(text, path, place)
    if text and "\0" in text:
        raise UserError(f"{shown(path)}, {place}: {_NUL}")
    return text
