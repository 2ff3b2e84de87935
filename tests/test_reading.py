"""What users point the commands at: every path and every file is read right, or refused in one line."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import itertools
import json
import os
import random
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storylab.cli import main
from storylab.cli.datasets import describe_dataset
from storylab.config import TrainConfig
from storylab.data import builtin
from storylab.data import tokenizer as tokenizers_here
from storylab.data.dataset import Dataset, load_dataset
from storylab.data.prepare import PrepareConfig, prepare
from storylab.data.reading import clean, read_texts
from storylab.data.separators import other_separator
from storylab.data.sources import download, local_source
from storylab.data.tally import Tally
from storylab.data.tokenizer import gpt2_tokenizer, train_tokenizer
from storylab.errors import UserError
from storylab.flags import default_for, parse
from test_data import hugging_face_gpt2

END = "<|endoftext|>"
STORIES = ["Tom ran.\nHe fell.", "Él comió “pan”.\n\nThe end.", "A cat sat on 1,234 mats!"]
TEXT = f"\n{END}\n".join(STORIES)


def read(path: Path) -> tuple[list[str], Tally]:
    """The stories of a file and what was counted."""
    tally = Tally()
    return list(clean(read_texts(path, tally), tally)), tally


def data_from(folder: Path, train: Path, **options: Any) -> Dataset:
    """The data set of some training files, with two short validation stories."""
    (folder / "held-out.txt").write_text(f"One.{END}Two.")
    validation = (folder / "held-out.txt",)
    out = folder / "out"
    return prepare(PrepareConfig(train=(train,), validation=validation, out=out, **options))


def refusal(folder: Path, train: Path) -> str:
    """The one line that a file or folder is refused with; nothing is left of the preparation."""
    with pytest.raises(UserError) as caught:
        data_from(folder, train)
    assert not (folder / "out").exists() and not (folder / ".out.partial").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stories_of(data: Dataset) -> list[str]:
    ids = data.splits["train"].read(0, len(data.splits["train"]))
    return data.tokenizer.decode(ids.tolist()).split(END)[:-1]


# --- paths


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("prepare --train '' --validation v.txt", "--train"),
        ("prepare --train v.txt --validation v.txt ''", "--validation"),
        ("prepare --train v.txt --validation=", "--validation"),
        ("prepare --source builtin --out ''", "--out"),
        ("prepare --source builtin --tokenizer_dir ''", "--tokenizer_dir"),
        ("prepare --source builtin --tokenizer-dir=", "--tokenizer_dir"),
        ("train --data_dir '' --max_iters 1", "--data_dir"),
        ("train --max_iters 1 --out-dir ''", "--out_dir"),
        ("resume ''", "RUN"),
        ("resume . --data_dir ''", "--data_dir"),
        ("eval --checkpoint last ''", "RUN"),
        ("sample ''", "RUN"),
        ("compare '' .", "RUNS"),
        ("list --runs ''", "--runs"),
        ("experiment run ''", "FILE"),
        ("experiment report --out ''", "--out"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
) -> None:
    (tmp_path / "v.txt").write_text("A story.")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 2
    assert capsys.readouterr().err.startswith(f"storylab: {name} has an empty path")
    assert [path.name for path in tmp_path.iterdir()] == ["v.txt"]


def test_a_point_is_the_current_folder() -> None:
    args = ["--data_dir", ".", "--out_dir", "./a"]
    config = parse(TrainConfig, args, "x", default_for(args))
    assert (config.data_dir, config.out_dir) == (Path(), Path("a"))


# --- text that is not as it was meant


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


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


def described(data: Dataset) -> list[str]:
    return describe_dataset(data.folder, data.manifest)


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
    monkeypatch.setattr("storylab.data.reading.MAX_STORY_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(("A story. " * 900).encode("utf-16-le"))
    assert "has NUL bytes" in refusal(tmp_path, tmp_path / "a.txt")


@pytest.mark.parametrize("before", [0, 3, 400])
def test_bad_bytes_are_named_by_file_and_place(
    tmp_path: Path, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_a_text_without_the_separator_tells_what_it_has_instead(
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


def test_what_reading_changed_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    for name, line_end in (("lf", "\n"), ("crlf", "\r\n")):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "a.txt"
        path.write_bytes(TEXT.replace("\n", line_end).encode())
        data_from(tmp_path / name, path)
    lf, crlf = (load_dataset(tmp_path / name / "out") for name in ("lf", "crlf"))
    assert lf.fingerprint == crlf.fingerprint
    assert lf.manifest["reading"] != crlf.manifest["reading"]


def test_data_of_earlier_versions_is_still_taken(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    data = data_from(tmp_path, tmp_path / "a.txt")
    old = {key: value for key, value in data.manifest.items() if key != "reading"}
    (data.folder / "manifest.json").write_text(json.dumps(old))
    again = data_from(tmp_path, tmp_path / "a.txt")
    assert again.manifest == old and again.fingerprint == data.fingerprint
    assert len(described(again)) == 6


def test_known_fingerprints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were before reading was checked: ordinary text has to give the same data. Where no test split
    is cut, they are those of versions without one."""
    config = PrepareConfig(source="builtin", tokenizer="bpe:300", builtin_stories=300)
    cut = prepare(dataclasses.replace(config, out=tmp_path / "cut"))
    assert cut.fingerprint == "967683247b219701487e34d1e1d8fcd266acac84963ba2f5b5d1a83422fb0834"
    monkeypatch.setattr("storylab.data.held_out.LEAST_STORIES", 300)
    whole = prepare(dataclasses.replace(config, out=tmp_path / "whole"))
    assert whole.fingerprint == "9e52854339d0e3619c3b19f55eb4dd790d2f3acfef88046830780cf3bbe98d8c"
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    assert data_from(tmp_path, tmp_path / "a.txt").fingerprint == KNOWN


KNOWN = "b847d56ef670afe1d7753111e2171fc976583eb2e580b4a216e4c5250ad5bcf7"


# --- folders


@pytest.mark.posix
def test_folders_are_read_whole_and_what_is_skipped_is_told(tmp_path: Path) -> None:
    contents = {
        "in/B.TXT": "Two.",
        "in/a.txt": "One.",
        "in/c.JSONL.GZ": gzip.compress(b'{"text": "Three."}'),
        "in/d.txt/part-0.txt": "Four.",
        "in/d.txt/more/deep.txt": "Five.",
        "in/.old.txt": "hidden",
        "in/.git/x.txt": "hidden",
        "in/notes.pdf": "other",
        "in/d.txt/_SUCCESS": "",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
    (tmp_path / "in/.#a.txt").symlink_to("someone@somewhere")
    (tmp_path / "in/up").symlink_to("..")
    (tmp_path / "in/again").symlink_to("d.txt")
    (tmp_path / "in/e").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/f.txt").write_text("Six.")
    source = local_source((tmp_path / "in",), (tmp_path / "in/B.TXT",))
    tally = Tally()
    stories = list(clean(source.texts("train", tally), tally))
    assert stories == ["Two.", "One.", "Five.", "Four.", "Three.", "Six."]
    assert tally.skipped == len(tally.skipped_names) == 7
    assert set(tally.skipped_names) == {
        *(".old.txt", ".git", ".#a.txt", "notes.pdf", "up", "d.txt"),
        "again/_SUCCESS",
    }
    assert "7 entries of folders not read (.#a.txt, .git, .old.txt, ...)" in tally.lines()


def test_a_folder_without_stories_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.pdf").write_text("x")
    assert "passed over 1 entry" in refusal(tmp_path, tmp_path / "in")


# --- what the file system says


def make(folder: Path, what: str) -> Path:
    """Something that cannot be read, under a name of a known kind."""
    path = folder / "a.txt"
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a device":
        path.symlink_to("/dev/zero")
    elif what == "a link to nothing":
        path.symlink_to("nothing")
    elif what == "a circle of links":
        path.symlink_to("b.txt")
        (folder / "b.txt").symlink_to("a.txt")
    elif what == "a long name":
        path = folder / ("x" * 300 + ".txt")
    elif what == "below a file":
        path.write_text("x")
        path = path / "b.txt"
    elif what == "a strange name":
        path = folder / "new\nline.txt"
    return path


@pytest.mark.posix
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("a pipe", "is a pipe"),
        ("a device", "is a device"),
        ("a link to nothing", "No such file"),
        ("a circle of links", "symbolic links"),
        ("a long name", "name too long"),
        ("below a file", "Not a directory"),
        ("missing", "No such file"),
        ("a strange name", "No such file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, what: str, says: str) -> None:
    path = make(tmp_path, what)
    message = refusal(tmp_path, path)
    assert says in message and str(path).replace("\n", "\\n") in message
    if what in ("a pipe", "a device", "a link to nothing", "a circle of links"):
        (tmp_path / "in").mkdir()
        for link in tmp_path.glob("[ab].txt"):
            link.rename(tmp_path / "in" / link.name)
        assert says in refusal(tmp_path, tmp_path / "in")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOENT, errno.EMFILE])
def test_errors_of_opening_name_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path, mode: str) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    (tmp_path / "a.txt").write_text("A story.")
    monkeypatch.setattr("storylab.files.open", refuse, raising=False)
    message = refusal(tmp_path, tmp_path / "a.txt")
    assert message.startswith(f"cannot read {tmp_path / 'a.txt'}: {os.strerror(number)}; ")


def test_a_folder_that_may_not_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in/locked").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("A story.")
    list_folder = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert f"cannot read {tmp_path / 'in/locked'}: Permission" in refusal(tmp_path, tmp_path / "in")


def test_a_file_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("A story.")

    def vanish(*arguments: Any) -> Any:
        (tmp_path / "a.txt").unlink()
        return gpt2_tokenizer()

    monkeypatch.setattr("storylab.data.prepare.gpt2_tokenizer", vanish)
    assert "No such file" in refusal(tmp_path, tmp_path / "a.txt")


@pytest.mark.posix
@pytest.mark.parametrize("out", ["file.txt", "link", "file.txt/x", "x" * 300, "/proc/x"])
def test_places_that_cannot_be_written_are_named(tmp_path: Path, out: str) -> None:
    (tmp_path / "file.txt").write_text("A story.")
    (tmp_path / "link").symlink_to("nothing")
    files = (tmp_path / "file.txt",)
    config = PrepareConfig(train=files, validation=files, keep_overlap=True, out=tmp_path / out)
    with pytest.raises(UserError, match=r"choose another|shorter path") as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "link"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.txt").write_text("A story.")
    monkeypatch.setattr("storylab.data.shards.os.fsync", fail)
    assert "No space left on device" in refusal(tmp_path, tmp_path / "a.txt")


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / ".out.partial/mine").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("A story.")
    with pytest.raises(UserError, match=r"\.out\.partial/mine"):
        data_from(tmp_path, tmp_path / "a.txt")
    assert (tmp_path / ".out.partial/mine").is_dir()


@pytest.mark.posix
def test_a_hub_cache_that_cannot_be_read_names_the_ways_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", "/cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"Permission denied.*three ways on"):
        download("a/b", "c.txt", "main", "dataset")


@pytest.mark.posix
@pytest.mark.parametrize("file", ["train-00000.bin", "tokenizer.tiktoken", "manifest.json"])
def test_a_pipe_in_a_data_set_does_not_hang(tmp_path: Path, dataset: Dataset, file: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset.folder, folder)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(UserError, match=r"pipe|no prepared data"):
        load_dataset(folder)


# --- damaged files


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


def test_checksums_of_parquet_pages_are_held_against_the_data(tmp_path: Path) -> None:
    table = pa.table({"text": ["A story of a cat and a dog."] * 3})
    path = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, path, **options)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"cat", b"rat"))
    assert path.read_bytes() != data
    assert "cannot read" in refusal(tmp_path, path)


# --- long runs and long words


GPT2, OTHER_GPT2 = gpt2_tokenizer(), hugging_face_gpt2()


def with_short_runs_cut(text: str) -> list[int]:
    """Ids of GPT-2 with runs of white space cut that are long for this test."""
    pattern = re.compile(tokenizers_here.HUGE_SPACE.pattern.replace("10000", "3"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers_here, "HUGE_SPACE", pattern)
        patch.setattr(tokenizers_here, "MAX_SPACE", 3)
        ids = GPT2.encode_stories([text]).tolist()
        assert GPT2.encode(text) == ids[:-1]
        return ids


SPACES = " \n\t\r\u00a0\u0085\u1680\u2003\u2028\u202f\u3000\x0b\x1c\u200b"


@settings(max_examples=400, deadline=None)
@given(st.text(st.sampled_from(SPACES + "   \n\nab1é.'s"), max_size=30))
def test_runs_of_space_are_cut_as_gpt2_would(text: str) -> None:
    assert with_short_runs_cut(text) == [*gpt2_ids(text), 50256]


def gpt2_ids(text: str) -> list[int]:
    return list(OTHER_GPT2.encode(text).ids)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
@pytest.mark.parametrize("end", ["y", "\u00e9", ".", "1", "'s"])
def test_long_runs_of_space_are_encoded_as_gpt2_would(space: str, end: str) -> None:
    for length in (9_999, 10_000, 10_001, 40_000):
        text = f"x{space * length}{end}\n \nz{space * length}"
        assert GPT2.encode(text) == gpt2_ids(text)


def test_a_million_spaces_are_prepared(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" + " " * 1_000_000 + "y")
    split = data_from(tmp_path, tmp_path / "a.txt").splits["train"]
    x, space, y = (gpt2_ids(text)[0] for text in ("x", " ", " y"))
    ids = split.read(0, len(split)).tolist()
    assert gpt2_ids("x" + " " * 1000 + "y") == [x, *[space] * 999, y]
    assert ids == [x, *[space] * 999_999, y, 50256]


@pytest.mark.parametrize("word", ["a", "\u6f22\u5b57\u4e00\u4e8c", "-", "12"])
def test_long_words_are_encoded_as_gpt2_would(word: str) -> None:
    text = word * (20_000 // len(word)) + " end"
    assert GPT2.encode_stories([text]).tolist() == [*gpt2_ids(text), 50256]


def test_long_words_are_counted_in_pieces(tmp_path: Path) -> None:
    """A vocabulary of text with long words is that of the same text with the words cut."""
    chance = random.Random(1)
    long = ["".join(chance.choices("abcd", k=n)) for n in (257, 5000, 512, 300)]
    usual = ["".join(chance.choices("abcd", k=n)) for n in (256, 255, 100)]
    cut = [word[i : i + 256] for word in long for i in range(0, len(word), 256)]
    whole = train_tokenizer(iter([*long, *usual]), 400)
    assert whole.tokens == plainly_trained([*cut, *usual], 400)
    assert whole.tokens != plainly_trained([*long, *usual], 400)


def plainly_trained(texts: list[str], size: int) -> tuple[bytes, ...]:
    """The vocabulary of the `tokenizers` library alone, of texts in letters that stand for themselves."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trainer = Tokenizer(models.BPE())
    trainer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False
    )
    trainer.train_from_iterator(texts, options)
    vocabulary = trainer.get_vocab()
    learned = sorted(vocabulary, key=vocabulary.__getitem__)[256:]
    return (*train_tokenizer(iter(["abab"]), 258).tokens[:256], *(t.encode() for t in learned))


@pytest.mark.slow
def test_a_long_word_among_stories_is_learned_from(tmp_path: Path) -> None:
    """Work that grew with the square of a word would keep this for hours."""
    stories = list(builtin.stories(0, 0, 60))
    words = ["a" * 1_000_000, "\u6f22\u5b57\u4e00\u4e8c" * 100_000, "x" + " " * 1_000_000 + "y"]
    (tmp_path / "a.txt").write_text(END.join([*stories, *words]), encoding="utf-8")
    data = data_from(tmp_path, tmp_path / "a.txt", tokenizer="bpe:300")
    assert stories_of(data) == [*stories, *words]


@pytest.mark.slow
@pytest.mark.posix
def test_training_a_vocabulary_hears_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers_here, "TRAINING_BYTES", 10**15)
    started, given_up = threading.Event(), time.monotonic() + 600

    def endless() -> Iterator[str]:
        for number in itertools.count():
            started.set()
            if time.monotonic() > given_up:
                raise AssertionError("Ctrl-C was not heard")
            yield builtin.story(0, number)

    def press() -> None:
        started.wait()
        os.kill(os.getpid(), 2)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(endless(), 300)
