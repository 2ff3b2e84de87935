"""Paths to read and to write: each is taken right or refused in one line."""

from __future__ import annotations

import errno
import gzip
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from story_files import data_from, refusal
from storylab.cli import main
from storylab.config import TrainConfig
from storylab.data.dataset import Dataset, load_dataset
from storylab.data.prepare import PrepareConfig, prepare
from storylab.data.reading import clean
from storylab.data.sources import download, local_source
from storylab.data.tally import Tally
from storylab.data.tokenizer import gpt2_tokenizer
from storylab.errors import UserError
from storylab.flags import default_for, parse


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


@pytest.mark.posix
def test_folders_are_read_whole_and_skipped_files_are_named(tmp_path: Path) -> None:
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
    # Errors that a file system gives only when it fails.
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

    # Root, who runs tests in containers, may list every folder.
    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert f"cannot read {tmp_path / 'in/locked'}: Permission" in refusal(tmp_path, tmp_path / "in")


def test_a_file_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("A story.")

    def vanish(*arguments: Any) -> Any:
        (tmp_path / "a.txt").unlink()
        return gpt2_tokenizer()

    # A step between the listing of the files and their reading.
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
    # A disk that is full shows it when data is flushed, at the latest.
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

    # The library raises this from within, where its cache cannot be read.
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
