"""A file that is none, or that the system refuses, is named in one line; the rest is reported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from damage import (
    FILES,
    KINDS,
    RECORD,
    Place,
    make_fifo,
    make_nonsense,
    no_longer_than,
    run_command,
)
from storylab.decode import convert, decode
from storylab.errors import UserError
from storylab.files import atomic_path, exists, open_file
from storylab.locks import held
from storylab.record.folder import RunFolder, open_run
from storylab.record.schema import DataInfo

pytestmark = pytest.mark.slow


def test_what_is_whole_is_read_by_every_verb(
    whole: Place, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in whole.copy(tmp_path / "place").verbs():
        code, text = run_command(capsys, args)
        assert code == 0 and "damaged" not in text, args


@pytest.mark.parametrize(
    ("file", "make"),
    [
        *((file, make_fifo) for file in FILES),
        *((file, make) for file in ("summary.json", "metrics.jsonl") for make in KINDS[1:]),
        *(("checkpoints/last.safetensors", make) for make in KINDS[1:]),
    ],
)
def test_a_file_that_is_none_is_named(
    whole: Place,
    tmp_path: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    file: str,
    make: Callable[[Path], None],
) -> None:
    place = whole.copy(tmp_path / "place")
    path = place.folders[0] / file
    path.unlink()
    make(path)
    for args in place.verbs():
        _, text = run_command(capsys, args)
        if args[0] == "list" and (file, make) == ("metrics.jsonl", make_nonsense):
            continue  # of a run that has ended it reads the summary alone, and looks for the rest
        if file in RECORD and args[0] not in ("sample", "eval", "resume"):
            assert place.folders[0].name in text and file in text, args
            if args[:2] == ["experiment", "report"]:
                assert "Not in the comparison:** low, seed 1:" in text
                assert place.folders[1].name not in text  # the others are well
                assert "| high |" in text
        if args[0] == "compare" and args[1] != str(place.folders[0]):
            assert "vs" in text  # those that are left are compared


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("file", ["manifest.json", "train-00000.bin", "validation.stories.npy"])
def test_a_file_of_the_data_that_is_none_is_named(
    whole: Place,
    tmp_path: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    file: str,
    make: Callable[[Path], None],
) -> None:
    place = whole.copy(tmp_path / "place")
    path = place.data / file
    path.unlink()
    make(path)
    for args in place.verbs():
        if "--data_dir" in args:
            code, text = run_command(capsys, args)
            assert code == 2 and f"{place.data.name}/{file}" in text


@pytest.mark.parametrize("make", KINDS)
def test_a_record_or_log_that_is_none_is_named(
    whole: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quick: None,
    make: Callable[[Path], None],
) -> None:
    place = whole.copy(tmp_path / "place")
    runs = ["--runs", str(place.runs)]
    make(place.runs / "experiments" / "other.json")
    code, text = run_command(capsys, ["experiment", "report", *runs])
    assert code == 0 and "other.json" in text and "## Experiment: Two rates" in text
    code, text = run_command(capsys, ["watch", *runs])
    assert code == 0 and "other.json" in text and "4 of 4 runs done" in text
    log = place.runs / "report" / "EXPERIMENTS.md"
    log.unlink()
    make(log)
    code, text = run_command(capsys, ["experiment", "report", *runs])
    assert code == 2 and "EXPERIMENTS.md" in text  # what may hold remarks is not written over


@pytest.mark.parametrize("number", [13, 5, 40, 36])  # EACCES, EIO, ELOOP, ENAMETOOLONG
def test_what_the_system_refuses_is_named(
    whole: Place,
    tmp_path: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """The system refuses every look at one run's folder; root, whom it refuses nothing, runs this too."""
    place = whole.copy(tmp_path / "place")
    closed = str(place.folders[0])

    def refusing(name: str) -> None:
        real = getattr(os, name)

        def call(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(closed + "/"):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return real(path, *args, **options)

        # Root, who runs tests in containers, is refused nothing.
        monkeypatch.setattr(os, name, call)

    for name in ("open", "stat", "lstat", "scandir", "listdir", "unlink"):
        refusing(name)
    for args in place.verbs():
        code, text = run_command(capsys, args)
        if args[:2] == ["experiment", "run"]:
            continue
        assert closed in text or place.folders[0].name in text, args
        assert os.strerror(number) in text, args
        if args == ["list", "--runs", str(place.runs)]:
            assert code == 0 and place.folders[1].name in text


def test_reading_names_what_it_cannot_read(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path, "it is a folder, not a file"),
        (Path("/dev/null"), "it is a device, not a file"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "none" / "below", "No such file"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=words) as caught, open_file(path):
            pass
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="too long"):
        exists(tmp_path / ("n" * 300))
    assert not exists(tmp_path / "none" / "below")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    with (
        pytest.raises(UserError, match=r"cannot write .*a\.json: No space left"),
        atomic_path(path),
    ):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    os.mkfifo(tmp_path / ".a.json.tmp")  # opening it to write would wait for ever
    with no_longer_than(900), atomic_path(path) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after"


def test_a_folder_that_cannot_be_opened_is_not_taken_for_one_at_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        held(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        held(tmp_path / "file")


def test_names_of_files_that_are_not_unicode_do_not_hide_the_rest(whole: Place) -> None:
    data = json.loads((whole.folders[0] / "data.json").read_text())
    odd = json.dumps(data | {"request": {"train": ["caf\udce9.txt"]}}).encode()
    assert decode(DataInfo, odd, "here").request == {"train": ["caf?.txt"]}
    odd = json.dumps(data | {"request": "\ud800", "dtype": 1}).encode()
    with pytest.raises(UserError, match="dtype: expected `str`, got `int`"):
        decode(DataInfo, odd, "here")
    with pytest.raises(UserError, match="fingerprint: is missing"):
        convert(DataInfo, {}, "here")


def test_a_run_is_a_folder_of_this_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        open_run(tmp_path)
    with pytest.raises(UserError, match=r"summary\.json"):
        (tmp_path / "summary.json").mkdir()
        RunFolder(tmp_path).read_summary()
