"""Preparing a data set: counts, fingerprint, and places that cannot be one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from list_source import STORIES, write
from storylab.data.prepare import PrepareConfig, prepare
from storylab.data.tokenizer import gpt2_tokenizer
from storylab.errors import UserError
from storylab.locks import exclusive


def test_counts_duplicates_and_overlap(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer()
    shared = ("Only here. " * 9).strip()
    data = write(tmp_path / "a", [*STORIES, shared], tokenizer)
    train = data.manifest["splits"]["train"]
    assert (train["stories"], train["duplicate_stories"]) == (4, 1)
    assert train["text_bytes"] == sum(len(s.encode()) for s in STORIES)
    assert data.manifest["overlap"] == {"train_stories_in_validation": 1, "left_out": True}
    kept = write(tmp_path / "b", [*STORIES, shared], tokenizer, keep=True)
    assert kept.manifest["splits"]["train"]["stories"] == 5
    assert kept.manifest["overlap"] == {"train_stories_in_validation": 1, "left_out": False}


@pytest.mark.slow
def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer()
    one, same = (write(tmp_path / n, STORIES, tokenizer).fingerprint for n in "ab")
    other = write(tmp_path / "c", STORIES[:3], tokenizer).fingerprint
    assert one == same != other


def test_preparing_twice_finds_what_is_there(tmp_path: Path) -> None:
    config = PrepareConfig(
        source="builtin", tokenizer="bpe:300", out=tmp_path / "d", builtin_stories=60
    )
    first = prepare(config)
    written = (tmp_path / "d" / "manifest.json").stat().st_mtime_ns
    assert prepare(config).fingerprint == first.fingerprint
    assert (tmp_path / "d" / "manifest.json").stat().st_mtime_ns == written
    other = PrepareConfig(
        source="builtin", tokenizer="bpe:301", out=tmp_path / "d", builtin_stories=60
    )
    with pytest.raises(UserError, match="another data set"):
        prepare(other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("precious")
    with pytest.raises(UserError, match="not a data set"):
        prepare(PrepareConfig(source="builtin", out=tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.doc").read_text() == "precious"


def test_two_processes_cannot_prepare_one_folder(tmp_path: Path) -> None:
    config = PrepareConfig(source="builtin", builtin_stories=60, out=tmp_path / "d")
    (tmp_path / ".d.partial").mkdir()
    with exclusive(tmp_path / ".d.partial"), pytest.raises(UserError, match="another process"):
        prepare(config)
    assert prepare(config).vocab_size == 50257


def test_places_that_cannot_be_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for out in (Path("file"), Path()):
        with pytest.raises(UserError, match="--out"):
            prepare(PrepareConfig(source="builtin", builtin_stories=60, out=out))


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    out = tmp_path / "data"
    command = [sys.executable, "-m", "storylab", "prepare", "--source", "builtin"]
    command += ["--builtin_stories", "200000", "--out", str(out)]
    for delay in (0.3, 0.6, 1.0):
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while not (tmp_path / ".data.partial" / "tokenizer.tiktoken").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    config = PrepareConfig(source="builtin", builtin_stories=60, out=out)
    assert prepare(config).manifest["splits"]["train"]["stories"] == 57
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
