"""Damaged rows and files are named, and odd ones that can be read are read."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from story_files import END, STORIES, TEXT, read, refusal, zstd
from storylab.errors import UserError


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"text": NaN}', "no string"),
        ('{"text": 5}', "no string"),
        ('{"text": ["a"]}', "no string"),
        ('["text"]', "no string"),
        ("5", "no string"),
        ('{"body": "a"}', 'has no "text"'),
        ('{"text": "a", "text": "b"}', '"text" twice'),
        ('{"text": "\\x"}', "not JSON"),
        ('{"text": "\\u12"}', "not JSON"),
        ('{"text": "\\ud83d"}', "half of a surrogate"),
        ('{"text": "\\ude00\\ud83d"}', "half of a surrogate"),
        ('{"text": "abc', "not JSON"),
        ('{"text": "a"}{"text": "b"}', "not JSON"),
        ("{'text': 'a'}", "not JSON"),
        ("\x01", "not JSON"),
    ],
)
def test_damaged_rows_are_named_by_line(tmp_path: Path, row: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "first"}}\n\n{row}\n{{"text": "last"}}\n')
    message = refusal(tmp_path, tmp_path / "a.jsonl")
    assert message.startswith(f"{tmp_path / 'a.jsonl'} line 3") and says in message


@pytest.mark.parametrize(
    "row",
    [
        '{"n": ' + "9" * 10_000 + ', "text": "ok"}',
        '{"n": 1e999, "text": "ok"}',
        '{"n": [NaN, -Infinity], "text": "ok"}',
        '{"n": 1, "n": 2, "text": "ok"}',
        '{"te\\u0078t": "ok"}',
        '  {"story": "ok"}\t',
    ],
)
def test_odd_rows_that_can_be_read_are(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(row)
    assert read(tmp_path / "a.jsonl")[0] == ["ok"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a.txt.gz", lambda data: data[:-5]),
        ("a.txt.gz", lambda data: data[: len(data) // 2]),
        ("a.txt.gz", lambda data: gzip.decompress(data)),
        ("a.txt.gz", lambda data: data + b"more"),
        ("a.txt.zst", lambda data: data[:-5]),
        ("a.txt.zst", lambda data: TEXT.encode()),
        ("a.jsonl.gz", lambda data: gzip.compress(data)),
        ("a.txt", lambda data: data),
        ("a.jsonl", lambda data: data),
        ("a.parquet", lambda data: data),
        ("a.parquet", lambda data: b""),
        ("a.parquet", lambda data: b"PAR1" + b"\0" * 50 + b"PARE"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    whole = zstd(TEXT.encode()) if name.endswith("zst") else gzip.compress(TEXT.encode())
    (tmp_path / name).write_bytes(change(whole))
    assert name in refusal(tmp_path, tmp_path / name)


def test_no_damage_escapes_as_another_error(tmp_path: Path) -> None:
    """Files with some bytes changed or cut off are read or refused, in one line that names them."""
    chance = random.Random(0)
    stories = [f"Story {n % 30} of a cat." for n in range(300)]
    rows = "".join(json.dumps({"text": s, "n": [1, {"a": None}]}) + "\n" for s in stories[:20])
    (tmp_path / "whole").mkdir()
    for column, options in (
        (pa.array(stories), {"compression": "zstd"}),
        (pa.array(stories), {"compression": "none", "write_page_checksum": True}),
        (pa.array(stories).dictionary_encode(), {"compression": "none"}),
    ):
        pq.write_table(pa.table({"text": column}), tmp_path / "whole/a.parquet", **options)
    (tmp_path / "whole/a.jsonl").write_text(rows)
    (tmp_path / "whole/a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "whole/a.txt").write_text(END.join(STORIES), encoding="utf-8")
    refused = 0
    for whole, _ in itertools.product((tmp_path / "whole").iterdir(), range(100)):
        data = bytearray(whole.read_bytes())
        for _ in range(chance.choice((1, 3, 20))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path = tmp_path / whole.name
        path.write_bytes(data[: chance.choice((len(data), chance.randrange(len(data))))])
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 200


def test_checksums_of_parquet_pages_are_checked(tmp_path: Path) -> None:
    table = pa.table({"text": ["A story of a cat and a dog."] * 3})
    path = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, path, **options)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"cat", b"rat"))
    assert path.read_bytes() != data
    assert "cannot read" in refusal(tmp_path, path)
