"""Text in other encodings, with other line ends, or with bytes that are no text."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from story_files import END, STORIES, data_from, described, read, refusal, stories_of, zstd
from storylab.data import builtin
from storylab.data.prepare import PrepareConfig, prepare


def in_every_format(folder: Path, stories: list[str]) -> Iterator[Path]:
    """Files of every kind that hold ``stories``, whatever their line ends."""
    text = f"\r\n{END}\r\n".join(stories).encode()
    rows = "".join(json.dumps({"text": s}) + "\r\n" for s in stories).encode()
    contents = {
        "a.txt": text,
        "a.txt.gz": gzip.compress(text),
        "a.txt.zst": zstd(text),
        "a.jsonl": rows,
        "b.jsonl": rows.replace(b"\r\n", b"\r"),
        "a.jsonl.gz": gzip.compress(rows),
        "a.jsonl.zst": zstd(rows),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield folder / name
    pq.write_table(pa.table({"text": stories}), folder / "a.parquet")
    yield folder / "a.parquet"


@pytest.mark.parametrize("line_end", ["\r\n", "\r"])
def test_line_ends_are_lf_from_every_format(tmp_path: Path, line_end: str) -> None:
    for path in in_every_format(tmp_path, [s.replace("\n", line_end) for s in STORIES]):
        stories, tally = read(path)
        assert stories == STORIES, path
        between = 4 if path.name.startswith("a.txt") else 0
        assert tally.line_ends == 3 + between, path


def test_line_ends_do_not_hide_overlap(tmp_path: Path) -> None:
    stories = list(builtin.stories(0, 0, 60))
    assert any("\n" in story for story in stories)
    (tmp_path / "lf.txt").write_bytes(f"\n{END}\n".join(stories[:12]).encode())
    crlf = f"\n{END}\n".join(stories).replace("\n", "\r\n")
    (tmp_path / "crlf.txt").write_bytes(crlf.encode())
    data = prepare(
        PrepareConfig(
            train=(tmp_path / "crlf.txt",),
            validation=(tmp_path / "lf.txt",),
            out=tmp_path / "out",
        )
    )
    overlap = data.manifest["overlap"]
    assert overlap["train_stories_in_validation"] + overlap["train_stories_in_test"] == 12
    assert data.manifest["splits"]["train"]["stories"] == 48
    assert stories_of(data) == stories[12:]
    counted = data.manifest["reading"]["train"]["line_ends"]
    assert f"train:       {counted:,} line ends of CR or CR LF made LF" in described(data)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"])
def test_other_encodings_of_unicode_are_refused(tmp_path: Path, name: str, encoding: str) -> None:
    data = '{"text": "A story."}\n'.encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    message = refusal(tmp_path, path)
    assert str(path) in message and "UTF-16" in message.replace("32", "16")
    assert "save it as UTF-8" in message


def test_nul_is_no_text_in_any_format(tmp_path: Path) -> None:
    stories = ["One.", "M\0i", "Three."]
    (tmp_path / "a.txt").write_bytes(END.join(stories).encode())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in stories))
    pq.write_table(pa.table({"text": stories}), tmp_path / "a.parquet")
    places = {"a.txt": r"byte 18 \(story 2\)", "a.jsonl": "line 2", "a.parquet": "row 2"}
    for name, place in places.items():
        assert re.search(f"{name},? {place}.*has NUL bytes", refusal(tmp_path, tmp_path / name))


def test_a_long_text_of_nul_bytes_is_not_taken_for_one_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A small limit: the real one takes 64 MB of text to reach.
    monkeypatch.setattr("storylab.data.reading.MAX_STORY_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(("A story. " * 900).encode("utf-16-le"))
    assert "has NUL bytes" in refusal(tmp_path, tmp_path / "a.txt")


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 3, 400])
def test_bad_bytes_are_named_by_file_and_place(
    tmp_path: Path, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small blocks: the bad byte is in the first, at a border, or in a later one.
    monkeypatch.setattr("storylab.data.reading.READ_BYTES", 1000)
    good = b"\xef\xbb\xbf" + b"".join(b"St\xc3\xb8ry.<|endoftext|>\r\n" for _ in range(before))
    text = good + b"The caf\xe9 was open.<|endoftext|>More.<|endoftext|>"
    rows = b'{"text": "x"}\n' * before + b'{"text": "caf\xe9"}\n'
    byte, row = text.index(0xE9), rows.index(0xE9)
    contents = {
        "a.txt": (text, f"byte {byte:,} (story {before + 1:,}): not UTF-8"),
        "a.txt.gz": (gzip.compress(text), f"byte {byte:,} uncompressed (story {before + 1:,})"),
        "a.jsonl": (rows, f"byte {row:,} (line {before + 1:,}): not UTF-8"),
        "a.jsonl.zst": (zstd(rows), f"byte {row:,} uncompressed (line {before + 1:,})"),
    }
    for name, (content, place) in contents.items():
        (tmp_path / name).write_bytes(content)
        message = refusal(tmp_path, tmp_path / name)
        assert message.startswith(f"{tmp_path / name}, {place}"), message
        assert "save it as UTF-8" in message and "get the file again" not in message


def test_bad_bytes_in_parquet_are_named_by_row(tmp_path: Path) -> None:
    values = pa.array([b"ok"] * 5000 + [b"caf\xe9", b"x"])
    mislabelled = pa.Array.from_buffers(pa.string(), len(values), values.buffers())
    for column in (values, mislabelled):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        message = refusal(tmp_path, tmp_path / "a.parquet")
        assert "a.parquet, row 5,001: not UTF-8" in message and "save it as UTF-8" in message
    words = pa.DictionaryArray.from_arrays([0, 5000], mislabelled)
    pq.write_table(pa.table({"text": words}), tmp_path / "a.parquet")
    message = refusal(tmp_path, tmp_path / "a.parquet")
    assert "not UTF-8; save it as UTF-8" in message and "get the file again" not in message


def test_byte_order_marks_are_removed_wherever_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"\ufeffOne.{END}\ufeffTwo.\ufeff Three.", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(
        '\ufeff{"text": "One."}\n\ufeff{"text": "Two.\\ufeff Three."}\n', encoding="utf-8"
    )
    for name in ("a.txt", "a.jsonl"):
        stories, tally = read(tmp_path / name)
        assert stories == ["One.", "Two. Three."] and tally.byte_order_marks == 3
    (tmp_path / "only.txt").write_bytes(b"\xef\xbb\xbf")
    assert "no training stories" in refusal(tmp_path, tmp_path / "only.txt")


@pytest.mark.slow
def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    rows = [
        '{"text": null}',
        "null",
        '{"text": ""}',
        '{"text": " \\n"}',
        '"plain"',
        "",
        '{"text": "a"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    pq.write_table(
        pa.table({"text": [None, None, "", " \n", "plain", "a"]}), tmp_path / "a.parquet"
    )
    for name in ("a.jsonl", "a.parquet"):
        stories, tally = read(tmp_path / name)
        assert stories == ["plain", "a"]
        assert (tally.null_rows, tally.blank_rows) == (2, 2)
    data = data_from(tmp_path, tmp_path / "a.parquet")
    assert "train:       2 null rows left out" in described(data)
    assert "train:       2 blank rows left out" in described(data)
