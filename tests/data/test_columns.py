"""Columns of Parquet files: text of every kind, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from story_files import read, refusal

TEXTS = pa.array(["One.", None, "Three."])


@pytest.mark.parametrize(
    "column",
    [
        TEXTS,
        TEXTS.cast(pa.large_string()),
        TEXTS.cast(pa.string_view()),
        TEXTS.cast(pa.binary()),
        TEXTS.cast(pa.large_binary()),
        TEXTS.dictionary_encode(),
    ],
    ids=lambda column: str(column.type)[:12],
)
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
def test_columns_of_text_of_every_kind_are_read(
    tmp_path: Path, column: pa.Array, compression: str
) -> None:
    table = pa.table({"id": [1, 2, 3], "text.more": [4, 5, 6], "text": column})
    pq.write_table(table, tmp_path / "a.parquet", compression=compression)
    stories, tally = read(tmp_path / "a.parquet")
    assert stories == ["One.", "Three."] and tally.null_rows == 1


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([["a"], ["b"]]), "holds list"),
        (pa.array([{"a": "b"}]), "holds struct"),
        (pa.array([1.5]), "holds double"),
        (pa.array([1, 2]).dictionary_encode(), "holds int64"),
        (pa.array([b"ab"], pa.binary(2)), "holds fixed_size_binary"),
        (pa.nulls(3), "no training stories"),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, str) else "",
)
def test_columns_of_something_else_are_refused(tmp_path: Path, column: pa.Array, says: str) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert says in refusal(tmp_path, tmp_path / "a.parquet")


def test_two_columns_of_the_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([TEXTS, TEXTS], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "two columns 'text'" in refusal(tmp_path, tmp_path / "a.parquet")
