"""Stories are separated by their marker, and another one is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2_reference import hugging_face_gpt2
from story_files import END, data_from, described, stories_of
from storylab.data.separators import other_separator


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_marker_inside_a_row_is_text(tmp_path: Path, kind: str) -> None:
    stories = [f"Ann wrote {END} on the wall. She smiled.", "Mira found a kite.", END, f"{END}x"]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": s}) + "\n" for s in stories))
    else:
        pq.write_table(pa.table({"text": stories}), path)
    data = data_from(tmp_path, path)
    split = data.splits["train"]
    other = hugging_face_gpt2()
    expected = [i for s in stories for i in [*other.encode(s).ids, 50256]]
    assert split.read(0, len(split)).tolist() == expected
    assert data.manifest["splits"]["train"]["stories"] == 4
    assert split.stories[1].tolist() == [len(other.encode(stories[0]).ids) + 1, len(stories[0])]
    assert "train:       3 stories with <|endoftext|> inside, kept as ordinary text" in described(
        data
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("separator", "has"),
    [
        ("</s>", "'</s>' 59 times"),
        ("<|end_of_text|>", "'<|end_of_text|>' 59 times"),
        ("<|ENDOFTEXT|>", "'<|ENDOFTEXT|>' 59 times"),
        ("< |endoftext| >", "'< |endoftext| >' 59 times"),
        ("\uff1c\uff5cendoftext\uff5c\uff1e", "'\uff1c\uff5cendoftext\uff5c\uff1e' 59 times"),
        ("[EOS]", "'[EOS]' 59 times"),
        ("---", "'---' 59 times"),
        ("* * *", "'* * *' 59 times"),
        ("%", "'%' 59 times"),
        ("", "59 blank lines"),
    ],
)
def test_a_text_without_the_separator_names_another_that_it_has(
    tmp_path: Path, separator: str, has: str
) -> None:
    stories = [f"My friend {n} found a kite. [He laughed.]" for n in range(60)]
    text = f"\n{separator}\n".join(stories)
    for number, end in enumerate(("", f"\n{END}\n")):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}/a.txt").write_text(text + end, encoding="utf-8")
        data = data_from(tmp_path / f"{number}", tmp_path / f"{number}/a.txt")
        assert data.manifest["splits"]["train"]["stories"] == 1
        expected = f"train:       a.txt is one story, without {END} inside (it has {has})"
        assert expected in described(data)
        assert not any("held-out" in line for line in described(data))


def test_a_separator_is_looked_for_in_a_bounded_part() -> None:
    found = other_separator("a\n\n" * 1_000_000)
    assert found == "333,333 blank lines in its first 1,000,000 characters"
    assert other_separator("One.\nTwo.") == "2 lines"


def test_many_files_without_a_separator_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(150):
        (tmp_path / f"in/{number:03}.txt").write_text(f"Story {number}.")
    data = data_from(tmp_path, tmp_path / "in")
    assert data.manifest["reading"]["train"]["unseparated"] == 150
    assert len(data.manifest["reading"]["train"]["unseparated_files"]) == 100
    assert "train:       147 more files of one story each" in described(data)
    assert stories_of(data) == [f"Story {number}." for number in range(150)]
