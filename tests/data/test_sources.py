"""Sources of stories: files and parts of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from storylab.data.reading import clean
from storylab.data.sources import FileSource, RowRange
from storylab.data.tally import Tally


def test_rows_of_a_split_are_counted_in_the_file(tmp_path: Path) -> None:
    """The card of tinystories-gpt4-clean gives its splits as row numbers; empty rows count."""
    pq.write_table(pa.table({"text": ["a", "", None, "b", "c", "d"]}), tmp_path / "a.parquet")
    rows = {"train": RowRange(4), "validation": RowRange(2, 4)}
    files = {split: (tmp_path / "a.parquet",) for split in rows}
    source = FileSource("x", files, rows, {})
    for split, stories, counts in (("validation", ["b"], (1, 0)), ("train", ["c", "d"], (0, 0))):
        tally = Tally()
        assert list(clean(source.texts(split, tally), tally)) == stories
        assert (tally.null_rows, tally.blank_rows) == counts  # of the split's own rows
