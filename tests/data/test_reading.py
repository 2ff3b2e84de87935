"""Every file format gives the same stories."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from list_source import STORIES, stories_in
from storylab.data.prepare import PrepareConfig, prepare
from storylab.errors import UserError


def test_every_file_format_gives_the_same_stories(tmp_path: Path) -> None:
    text = "\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n"
    rows = "".join(json.dumps({"text": s}) + "\n" for s in STORIES)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    with pa.output_stream(str(tmp_path / "d.txt.zst"), compression="zstd") as stream:
        stream.write(text.encode())
    pq.write_table(pa.table({"text": STORIES}), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert stories_in(path) == STORIES, path


def test_stories_longer_than_a_read_block_stay_whole(tmp_path: Path) -> None:
    stories = ["é" * 1_500_001, "short", "x" * 3_000_000]
    path = tmp_path / "long.txt"
    path.write_text("<|endoftext|>".join(stories), encoding="utf-8")
    assert stories_in(path) == stories


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("One.<|endoftext|>Two.".encode("utf-8-sig"))
    assert stories_in(tmp_path / "a.txt") == ["One.", "Two."]


def test_separators_across_blocks_and_text_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stories = ["é" * n for n in range(1, 40)] + ["<|endof|>" * 3]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    for size in (1, 7, 64):
        # Small blocks: a separator falls on every place of a border.
        monkeypatch.setattr("storylab.data.reading.READ_BYTES", size)
        assert stories_in(tmp_path / "a.txt") == stories
    # A small limit: the real one takes 64 MB of text to reach.
    monkeypatch.setattr("storylab.data.reading.MAX_STORY_BYTES", 50)
    with pytest.raises(UserError, match="between stories"):
        stories_in(tmp_path / "a.txt")


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="int64, not text"):
        stories_in(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n<|endoftext|>\n", "no training stories"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "byte 3 .*save it as UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{oops\n', "line 2"),
        ("other.jsonl", b'{"body": "a"}\n', '"text"'),
        ("bad.parquet", b"PAR1 not really", "cannot read"),
        ("bad.jsonl.gz", b"\x1f\x8b nonsense", "cannot read"),
        ("a.pdf", b"", "no known kind"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("A story.")
    config = PrepareConfig(
        train=(tmp_path / name,), validation=(tmp_path / "good.txt",), out=tmp_path / "out"
    )
    with pytest.raises(UserError, match=message):
        prepare(config)
    assert not (tmp_path / "out").exists()
